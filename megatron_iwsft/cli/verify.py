"""Check that a Hugging Face directory and a checkpoint are the same model: compare the log-probs of every token of a text.

The directory runs in `transformers`, the checkpoint in Megatron-Core, both on the CPU.

example:
  iwsft verify models/iw-sft runs/iw-sft --text sample.txt --length 512 4096
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import LOADING, say

_TEXT = "A train leaves at 9:40 and arrives at 12:05. How long is the journey? From 9:40 to 12:05 is 2 hours and 25 minutes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf", metavar="HF_DIR", help="Hugging Face directory")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text file to compare on; default: a built-in sentence"
    )
    parser.add_argument(
        "--length",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="repeat the text to N tokens; default: the text as it is, and just beyond the model's original context, its full context "
        "and its sliding window, up to 16,384 tokens",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest absolute log-prob difference allowed, in nats"
    )
    parser.add_argument(
        "--time-limit",
        type=positive_int,
        metavar="SECONDS",
        help="begin no further length after this time; report those that were compared. default: none",
    )


def run(args: argparse.Namespace) -> None:
    if any(n < 2 for n in args.length or []):
        raise ConfigError("--length must be at least 2: the first token has no log-prob.")
    if args.text and not args.text.is_file():
        raise CheckpointError(f"text file {args.text} does not exist. Check --text.")
    say(LOADING, error=True)

    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert.parity import verify

    text = args.text.read_text(encoding="utf-8") if args.text else _TEXT
    parities = verify(args.hf, args.checkpoint, text, lengths=args.length, limit_s=args.time_limit, report=say)
    for parity in parities:
        say(
            f"{parity.tokens:,} tokens: log-probs differ by at most {parity.max_difference:.2e} (mean {parity.mean_difference:.2e}), "
            f"at token {parity.worst} {parity.worst_token!r}: {parity.theirs:.6f} in transformers, {parity.ours:.6f} here"
        )
    if not all(parity.max_difference <= args.tolerance for parity in parities):  # NaN too
        raise CheckpointError(
            f"the two models differ by more than {args.tolerance:g}. "
            "Check that the directory was exported from this checkpoint, or raise --tolerance."
        )
