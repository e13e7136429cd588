"""Train a policy with the objective, data and parallel layout of a config. A run that was stopped continues from its newest checkpoint.

example, 8 processes on one machine (torchrun works too):
  python -m megatron_iwsft.distributed.torchrun --nproc_per_node 8 -m megatron_iwsft train --config CONFIG.yaml optimizer.lr=2e-5

exit status: 0 finished, 2 mistake in config or data, 75 stopped by SIGUSR1 or SIGTERM after saving (start it again to continue)
"""

from __future__ import annotations

import argparse

from megatron_iwsft.cli.options import add_config, start_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(args: argparse.Namespace) -> None:
    config = start_process(args)

    from megatron_iwsft.distributed.context import stop
    from megatron_iwsft.train.trainer import train

    train(config)
    stop()
