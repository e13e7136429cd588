"""The paper's continuous-control experiment: train an agent, record its replay, fine-tune with each method, print the table of returns.

Needs the `control` extra (Gymnasium, MuJoCo). The config has its own fields: megatron_iwsft/experiments/control/config.py.

example:
  iwsft control --config CONTROL.yaml --quick
"""

from __future__ import annotations

import argparse

from megatron_iwsft.cli.options import add_config
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--quick", action="store_true", help="smoke test of a few seconds; its numbers mean nothing")


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.experiments.control.config import QUICK, load_experiment
    from megatron_iwsft.experiments.control.experiment import run_experiment, table

    experiment = load_experiment(args.config, [*(QUICK if args.quick else []), *args.overrides])
    say(table(experiment, run_experiment(experiment)))
