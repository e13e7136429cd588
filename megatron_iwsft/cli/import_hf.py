"""Convert a Hugging Face directory (safetensors) to a checkpoint, with pipeline × lcm(tensor, expert) processes.

A config can also load the directory itself (model.hf); a checkpoint is worth it when many runs start from it.
With --megatron, the weights are those of a checkpoint of Megatron-LM or Megatron-Bridge (torch_dist).

examples:
  iwsft import --model /models/Qwen2.5-7B --output checkpoints/qwen2.5-7b --dtype bf16
  iwsft import --megatron runs/mlm --model /models/Qwen2.5-7B --output checkpoints/start
"""

from __future__ import annotations

import argparse

from megatron_iwsft.cli.options import add_degrees
from megatron_iwsft.utils.text import LOADING, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face directory: config.json and safetensors files"
    )
    parser.add_argument(
        "--megatron",
        metavar="DIR",
        help="take the weights from a run of Megatron-LM or Megatron-Bridge: its last iteration, or that of iter_… if DIR is one; --model "
        "then needs only config.json and the tokenizer",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write the checkpoint under")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the parameters in the checkpoint")
    add_degrees(parser, "tensor", "pipeline", "expert")


def run(args: argparse.Namespace) -> None:
    say(LOADING, error=True)
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert.import_hf import import_directory
    from megatron_iwsft.hf.architecture import Architecture

    degrees = dict(tensor=args.tensor, pipeline=args.pipeline, expert=args.expert)
    written = import_directory(args.model, args.output, dtype=args.dtype, megatron=args.megatron, **degrees)
    ignored = Architecture.from_directory(args.model).ignored_keys
    if ignored:
        say(ignored)
    say(f"wrote {written}")
