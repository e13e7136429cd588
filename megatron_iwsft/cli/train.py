"""Train a policy with the objective, data and parallel layout of a config. A run that was stopped continues from its newest checkpoint.

example, 8 processes on one machine (torchrun works too):
  python -m megatron_iwsft.distributed.torchrun --nproc_per_node 8 -m megatron_iwsft train --config CONFIG.yaml optimizer.lr=2e-5
example, what that would do, without a GPU:
  iwsft train --config CONFIG.yaml --dry-run --gpus 8

exit status: 0 finished, 2 mistake in config or data, 75 stopped by Ctrl-C, SIGUSR1 or SIGTERM after saving (start it
again to continue)
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
        return dry_run(args, "train")
    refuse_dry_run_options(args)
    with imports():
        config = start_process(args)

        from megatron_iwsft.distributed.context import stop
        from megatron_iwsft.train.trainer import train

    train(config)
    stop()
    return None
