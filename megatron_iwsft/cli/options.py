"""What several subcommands share: options, and the start of a job's process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iwsft.distributed.stop_signals import leave_on_stop_signals
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.launch import check_launch_environment

if TYPE_CHECKING:
    from megatron_iwsft.config.schema import Config


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config and the positional overrides; `start_process` reads them."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG.yaml", help="config file; `iwsft config` lists all fields"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set config fields; values in YAML")


def start_process(args: argparse.Namespace) -> Config:
    """The config of a job that this process is part of. The process is ready for Megatron-Core afterwards.

    Mistakes that can be seen without torch, which takes seconds to import, are reported before. Raises ConfigError or DataError.
    """
    leave_on_stop_signals()

    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.data.manifest import read_manifest

    config = load_config(args.config, args.overrides)
    check_launch_environment()
    config.layout(int(os.environ.get("WORLD_SIZE", "1")))
    for entry in config.data.mixture:
        read_manifest(Path(entry.corpus))

    from megatron_iwsft.distributed.context import prepare

    prepare(config.run.device)
    return config


def add_degrees(parser: argparse.ArgumentParser, *names: str) -> None:
    """--tensor, --pipeline, … as named."""
    for name in names:
        parser.add_argument(f"--{name}", type=positive_int, default=1, metavar="N", help=f"{name}-parallel degree")
