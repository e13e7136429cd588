"""What several subcommands share: options, and the start of a job's process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iwsft.distributed.stop_signals import leave_on_stop_signals
from megatron_iwsft.errors import EXIT_USER_ERROR, ConfigError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.launch import check_launch_environment
from megatron_iwsft.utils.text import LOADING, say, tell

if TYPE_CHECKING:
    from megatron_iwsft.config.schema import Config
    from megatron_iwsft.train.plan import Command


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config and the positional overrides; `start_process` reads them."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG.yaml", help="config file; `iwsft config` lists all fields"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set config fields; values in YAML")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The options that `dry_run` reads."""
    add = parser.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan, in one process without a GPU; write nothing",
    )
    add(
        "--gpus",
        type=positive_int,
        metavar="N",
        help="with --dry-run: processes to plan for; default parallel.world_size",
    )
    add(
        "--model-config",
        metavar="FILE",
        help="with --dry-run: a config.json to plan with, where the model is not on this machine",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="with --dry-run: list a model, corpus, sidecar or disk space that this machine lacks, and exit with status 0",
    )


def dry_run(args: argparse.Namespace, command: Command) -> int:
    """Print the plan of a job; the exit status: 2 if it lacks disk space. Raises a UserError for anything else that would stop it.

    Of the processes that torchrun starts, the first one does so.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0

    from megatron_iwsft.config.loader import load_config

    config = load_config(args.config, args.overrides)
    world_size = args.gpus or int(os.environ.get("WORLD_SIZE", "0")) or config.parallel.world_size
    if world_size is None:
        raise ConfigError("--dry-run needs the number of processes: --gpus N, or parallel.world_size in the config.")
    config.layout(world_size)
    say(LOADING, error=True)

    from megatron_iwsft.distributed.context import prepare

    prepare("cpu")

    from megatron_iwsft.train.plan import plan

    found = plan(
        command,
        config,
        world_size=world_size,
        model_config=args.model_config,
        allow_missing=args.allow_missing,
    )
    say(str(found))
    return EXIT_USER_ERROR if found.missing and not args.allow_missing else 0


def refuse_dry_run_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option that only --dry-run reads."""
    for name in ("gpus", "model_config", "allow_missing"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} goes with --dry-run.")


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
    if os.environ.get("RANK", "0") == "0":
        tell(LOADING, error=True)

    from megatron_iwsft.distributed.context import prepare

    prepare(config.run.device)
    return config


def add_degrees(parser: argparse.ArgumentParser, *names: str) -> None:
    """--tensor, --pipeline, … as named."""
    for name in names:
        parser.add_argument(f"--{name}", type=positive_int, default=1, metavar="N", help=f"{name}-parallel degree")
