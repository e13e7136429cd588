"""Train: torchrun … launch/train.py --config C.yaml [section.key=value …]"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file; see megatron_iwsft/config/schema.py for every key")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    args = parser.parse_args()

    from megatron_iwsft.config.loader import load_config

    config = load_config(args.config, args.overrides)  # a mistake is told before torch is loaded

    from megatron_iwsft.distributed.context import quiet_megatron, stop

    quiet_megatron()

    from megatron_iwsft.train.trainer import train

    train(config)
    stop()


if __name__ == "__main__":  # the checkpoint writer spawns processes that import this file
    run_command(main)
