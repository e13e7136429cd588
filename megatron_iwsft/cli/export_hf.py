"""Convert a checkpoint to a Hugging Face directory, in one process, without a GPU, holding about one tensor in memory at a time.

Works for a checkpoint of any parallel layout, also while its run continues. A checkpoint of adapters becomes a PEFT adapter, or with
--merge a model.

example:
  iwsft export --checkpoint runs/iw-sft --output models/iw-sft --dtype bf16
"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.text import LOADING, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run directory (its latest)"
    )
    parser.add_argument(
        "--best", action="store_true", help="of a run with checkpoint.best: its best checkpoint instead"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the tensors; default: the run's")
    parser.add_argument("--merge", action="store_true", help="add a checkpoint's adapters to their base model")
    parser.add_argument("--base", metavar="DIR", help="with --merge: the base model, if it has moved since the run")


def run(args: argparse.Namespace) -> None:
    say(LOADING, error=True)
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert.export import earlier_checkpoint, export_checkpoint
    from megatron_iwsft.errors import DamageError

    try:
        written = export_checkpoint(
            args.checkpoint, args.output, dtype=args.dtype, best=args.best, merge=args.merge, base=args.base
        )
    except DamageError as error:
        earlier = None if args.best else earlier_checkpoint(args.checkpoint)
        if earlier is None:
            raise
        raise DamageError(f"{error} The one before it is intact: use --checkpoint {earlier}") from None
    say(f"wrote {written}")
