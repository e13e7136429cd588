"""Compute the reference's log-probs: torchrun … tools/precompute_reference.py --config C.yaml [section.key=value …]"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the config of the run that will use them")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    args = parser.parse_args()

    from megatron_iwsft.config.loader import load_config

    config = load_config(args.config, args.overrides)  # a mistake is told before torch is loaded

    from megatron_iwsft.distributed.context import quiet_megatron, stop

    quiet_megatron()

    from megatron_iwsft.train.precompute import precompute_reference

    precompute_reference(config)
    stop()


if __name__ == "__main__":
    run_command(main)
