"""The `iwsft` command: look up the subcommand, parse its arguments, run it.

A subcommand is one module of this package with two functions:

    add_arguments(parser)      declare the options
    run(args) -> int | None    do the work; the exit status, None for 0

Its docstring is the help text. Heavy imports belong inside `run`, so that `--help` and a mistake in the arguments are instant.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import run_command
from megatron_iwsft.utils.text import say
from megatron_iwsft.version import __version__

# name → (module, one-line help), in the order in which a run needs them.
COMMANDS = {
    "shard": ("shard", "records (JSONL, Parquet) → corpus directory"),
    "inspect": ("inspect", "show what a corpus, checkpoint or run directory holds; verify its files"),
    "reference": ("reference", "compute the reference log-probs of a corpus (run under torchrun)"),
    "train": ("train", "train a policy (run under torchrun)"),
    "report": ("report", "runs → one self-contained HTML page"),
    "import": ("import_hf", "Hugging Face directory → checkpoint"),
    "export": ("export_hf", "checkpoint → Hugging Face directory"),
    "verify": ("verify", "compare a Hugging Face directory with a checkpoint, log-prob by log-prob"),
    "evaluate": ("evaluate", "pass@k, log-likelihood or lm-evaluation-harness scores of one or more models"),
    "generate": ("generate", "answer questions with an exported model"),
    "config": ("config", "list every config field; check a config file and print it resolved"),
    "doctor": ("doctor", "show what this machine has, what that enables and what to install"),
    "layouts": ("layouts", "list the parallel layouts that fit a model, with memory per GPU"),
    "reference-costs": ("reference_costs", "FLOPs, memory and disk of each kind of reference and proposal"),
    "train-tokenizer": ("train_tokenizer", "train a BPE tokenizer on JSONL records"),
    "make-arithmetic": ("make_arithmetic", "generate an arithmetic corpus with quality scores"),
    "completion": ("completion", "print a script that completes commands and options in bash, zsh or fish"),
    "control": ("control", "the paper's continuous-control experiment"),
}

# Former names of options, which still work: command → {former: present}.
FORMER_OPTIONS = {
    "shard": {"--task": "--share"},
    "inspect": {"--samples": "--trajectories"},
    "import": {"--hf": "--model"},
    "verify": {"--limit": "--time-limit"},
    "evaluate": {"--tensor-parallel": "--tensor"},
    "doctor": {"--limit": "--time-limit"},
    "layouts": {"--most": "--limit"},
    "train-tokenizer": {"--field": "--text-field"},
}


def main(arguments: list[str] | None = None, *, commands: Iterable[str] = COMMANDS) -> NoReturn:
    """Run `iwsft` with `arguments` (default: the command line's), restricted to `commands`, and exit with its status."""
    run_command(lambda: run(sys.argv[1:] if arguments is None else arguments, commands=commands))


def run(arguments: list[str], *, commands: Iterable[str] = COMMANDS) -> int | None:
    """Like `main`, but return the exit status. Raises ConfigError for a mistake in the arguments."""
    commands = list(commands)
    if not arguments:
        raise ConfigError(f"a command is missing: {', '.join(commands)}. See `iwsft --help`.")
    name, *rest = arguments
    if name in ("-h", "--help"):
        say(overview(commands))
        return 0
    if name == "--version":
        say(f"megatron-iwsft {__version__}")
        return 0
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(commands)}."
        raise ConfigError(f"unknown command {name!r}. {hint}")
    module = command_module(name)
    parser = command_parser(name)
    args, unknown = parser.parse_known_args(_present_names(name, rest))
    if "overrides" in args:  # argparse takes positionals only up to the next option
        args.overrides = [*args.overrides, *(word for word in unknown if not word.startswith("-"))]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown and not getattr(module, "ACCEPTS_UNKNOWN", False):
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    args.unknown = unknown
    return module.run(args)


def _present_names(command: str, arguments: list[str]) -> list[str]:
    """`arguments` with the present names of options that are given by former ones."""
    present = FORMER_OPTIONS.get(command, {})
    options = (argument.partition("=") for argument in arguments)
    return [present.get(option, option) + equals + value for option, equals, value in options]


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command: for running it, for shell completion and for the documentation."""
    module = command_module(name)
    parser = _Parser(prog=f"iwsft {name}", description=module.__doc__, formatter_class=_HelpFormatter)
    module.add_arguments(parser)
    return parser


def command_module(name: str) -> Any:
    """The module of one command."""
    return importlib.import_module(f"megatron_iwsft.cli.{COMMANDS[name][0]}")


def overview(commands: Iterable[str]) -> str:
    """The text of `iwsft --help`."""
    lines = [f"  {name:16} {COMMANDS[name][1]}" for name in commands]
    return "\n".join(
        [
            "usage: iwsft COMMAND …",
            "",
            "Importance-weighted supervised fine-tuning on Megatron-Core.",
            "",
            *lines,
            "",
            "`iwsft COMMAND --help` shows a command's options; `iwsft --version` the version.",
        ]
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage text, and, under torchrun, from one rank instead of from each."""
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's line breaks; appends defaults that the help text does not mention and that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == []
            or "default" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)
