"""The seed paper's continuous-control experiment, from a policy in training to the table of methods.

tools/control.py --config configs/control-iwsft.yaml [--quick] [section.key=value …]
"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds, whose figures mean nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()

    from megatron_iwsft.experiments.control.config import QUICK, load_experiment
    from megatron_iwsft.experiments.control.experiment import run_experiment, table

    experiment = load_experiment(args.config, [*(QUICK if args.quick else []), *args.overrides])
    print(table(experiment, run_experiment(experiment)))


if __name__ == "__main__":
    run_command(main)
