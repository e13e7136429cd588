"""Checkpoints ↔ Hugging Face.

tools/convert_hf.py import --hf DIR --output CKPT
tools/convert_hf.py export --checkpoint CKPT --output DIR
tools/convert_hf.py verify HF_DIR CKPT [--text FILE] [--length N …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.cli import positive_int, run_command

_TEXT = "A train leaves at 9:40 and arrives at 12:05. How long is the journey? From 9:40 to 12:05 is 2 hours and 25 minutes."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_checkpoint = commands.add_parser("import", help="Hugging Face directory → checkpoint")
    to_checkpoint.add_argument("--hf", required=True, help="directory with config.json and safetensors")
    to_checkpoint.add_argument("--output", required=True, help="directory to write the checkpoint under")
    to_checkpoint.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    for degree in ("tensor", "pipeline", "expert"):
        to_checkpoint.add_argument(f"--{degree}", type=positive_int, default=1, help=f"{degree}-parallel degree")
    to_hf = commands.add_parser("export", help="checkpoint → Hugging Face directory")
    to_hf.add_argument("--checkpoint", required=True, help="a checkpoint, or a run directory (its latest)")
    to_hf.add_argument("--output", required=True, help="directory to make")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the run's")
    check = commands.add_parser("verify", help="compare log-probs of both, token by token")
    check.add_argument("hf")
    check.add_argument("checkpoint")
    check.add_argument("--text", type=Path, help="text file to compare on; default: a built-in sentence")
    check.add_argument(
        "--length",
        type=positive_int,
        nargs="+",
        help="tokens to repeat the text to; default: as it is, and a little beyond the model's original and full context length "
        "and its sliding window, up to 16,384",
    )
    check.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed (default: 1e-4)")
    args = parser.parse_args()

    from megatron_iwsft.distributed.context import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert.export import export_checkpoint
    from megatron_iwsft.convert.import_hf import import_directory
    from megatron_iwsft.convert.parity import verify

    if args.command == "verify" and any(n < 2 for n in args.length or []):
        parser.error("--length must be at least 2")
    if args.command == "import":
        degrees = dict(tensor=args.tensor, pipeline=args.pipeline, expert=args.expert)
        written = import_directory(args.hf, args.output, dtype=args.dtype, **degrees)
        print(f"wrote {written}")
    elif args.command == "export":
        print(f"wrote {export_checkpoint(args.checkpoint, args.output, dtype=args.dtype)}")
    else:
        if args.text and not args.text.is_file():
            raise CheckpointError(f"text file {args.text} does not exist.")
        text = args.text.read_text(encoding="utf-8") if args.text else _TEXT
        parities = verify(args.hf, args.checkpoint, text, lengths=args.length)
        for parity in parities:
            print(
                f"{parity.tokens:,} tokens: log-probs differ by at most {parity.max_difference:.2e} (mean {parity.mean_difference:.2e}), "
                f"at token {parity.worst} {parity.worst_token!r}: {parity.theirs:.6f} in transformers, {parity.ours:.6f} here"
            )
        if not all(parity.max_difference <= args.tolerance for parity in parities):  # NaN too
            raise CheckpointError(f"the two models differ by more than {args.tolerance:g}.")
    return 0


if __name__ == "__main__":  # the checkpoint writer spawns processes that import this file
    run_command(main)
