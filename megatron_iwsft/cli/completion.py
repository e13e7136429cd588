"""Print a script that completes commands, options, their choices and files in a shell. Completion starts no Python process.

examples:
  iwsft completion bash > ~/.local/share/bash-completion/completions/iwsft
  iwsft completion zsh > ~/.zfunc/_iwsft                             # with `fpath+=~/.zfunc` before compinit in ~/.zshrc
  iwsft completion fish > ~/.config/fish/completions/iwsft.fish
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from megatron_iwsft.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="shell to complete in")


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise ConfigError("`iwsft completion` needs the package shtab: pip install shtab.") from None

    files = {"FILE": shtab.FILE, "PATH": shtab.FILE, "INPUT": shtab.FILE, ".yaml": shtab.FILE, ".jsonl": shtab.FILE}
    files |= {"DIR": shtab.DIRECTORY, "CHECKPOINT": shtab.DIRECTORY}
    parser = _whole_parser(files)
    print(shtab.complete(parser, shell=args.shell))


def _whole_parser(files: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """One parser with all commands as subparsers, as shtab reads them. files: how the last word of a metavar is completed."""
    from megatron_iwsft.cli.main import COMMANDS, command_module

    parser = argparse.ArgumentParser(prog="iwsft")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        command_module(name).add_arguments(command)
        for action in command._actions:
            end = re.search(r"\.?\w+$", str(action.metavar).replace("_", " "))
            if end and end[0] in files:
                action.complete = files[end[0]]  # type: ignore[attr-defined]
    return parser
