"""Options that several subcommands share."""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import positive_int


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config and the positional overrides; read them with `load_config(args.config, args.overrides)`."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG.yaml", help="config file; `iwsft config` lists all fields"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set config fields; values in YAML")


def add_degrees(parser: argparse.ArgumentParser, *names: str) -> None:
    """--tensor, --pipeline, … as named."""
    for name in names:
        parser.add_argument(f"--{name}", type=positive_int, default=1, metavar="N", help=f"{name}-parallel degree")
