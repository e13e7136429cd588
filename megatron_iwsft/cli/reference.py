"""Compute the reference log-probs of the config's corpora, one forward pass, for `reference.source: cached`.

Uses the layout, packing and batch sizes of the config, so that policy and reference go through the same arithmetic.
A run that was stopped continues where it was.

example, 8 processes on one machine (torchrun works too):
  python -m megatron_iwsft.distributed.torchrun --nproc_per_node 8 -m megatron_iwsft reference --config CONFIG.yaml
"""

from __future__ import annotations

import argparse

from megatron_iwsft.cli.options import add_config, add_dry_run, dry_run, refuse_dry_run_options, start_process
from megatron_iwsft.utils.cli import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_dry_run(parser)


def run(args: argparse.Namespace) -> int | None:
    if args.dry_run:
        return dry_run(args, "reference")
    refuse_dry_run_options(args)
    with imports():
        config = start_process(args)

        from megatron_iwsft.distributed.context import stop
        from megatron_iwsft.train.precompute import precompute_reference

    precompute_reference(config)
    stop()
    return None
