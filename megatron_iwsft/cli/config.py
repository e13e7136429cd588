"""List the config fields, or check a config file and print it with all defaults filled in.

examples:
  iwsft config                                        all sections and fields: type, default, one line each
  iwsft config --field data.packing                   everything about one field or section
  iwsft config CONFIG.yaml optimizer.lr=2e-5          the resolved config, as YAML
  iwsft config --get run.dir CONFIG.yaml              one resolved value
"""

from __future__ import annotations

import argparse
import difflib
from typing import TYPE_CHECKING, Any

from megatron_iwsft.errors import ConfigError

if TYPE_CHECKING:
    from megatron_iwsft.config.schema import Config

_NEEDS_SIDECAR = "reference.needs_sidecar"
_DIRECTORIES = "data.directories"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="config file to check and print")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set config fields; values in YAML")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--field", metavar="KEY", help="document one field or section")
    what.add_argument(
        "--get",
        action="append",
        metavar="KEY",
        help=f"print one resolved value; repeatable. {_NEEDS_SIDECAR}: whether `iwsft reference` must run before training; "
        f"{_DIRECTORIES}: of all corpora, one per line",
    )
    parser.add_argument(
        "--null", action="store_true", help="end each value of --get with a null byte instead of a newline"
    )


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.config.describe import describe_field, describe_schema, yaml_text
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.config.schema import Config

    if args.null and not args.get:
        raise ConfigError("--null goes with --get.")
    if args.config is None:
        if args.get:
            raise ConfigError("--get needs a config file: iwsft config --get KEY CONFIG.yaml.")
        print(describe_field(Config, args.field) if args.field else describe_schema(Config))
        return
    if args.field:
        raise ConfigError(
            f"--field documents the schema and takes no config file; use --get {args.field} for its value."
        )
    config = load_config(args.config, args.overrides)
    if args.get:
        for key in args.get:
            print(yaml_text(_value(config, key)), end="\0" if args.null else "\n")
    else:
        print(config.to_yaml(), end="")


def _value(config: Config, key: str) -> Any:
    """The value of section.key. Raises ConfigError, with the nearest known key, if there is none."""
    if key == _NEEDS_SIDECAR:
        return _needs_sidecar(config)
    if key == _DIRECTORIES:
        return "\n".join(entry.corpus for entry in config.data.mixture)
    value: Any = config.model_dump()
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            from megatron_iwsft.config.describe import fields

            near = difflib.get_close_matches(key, [name for name, _ in fields(type(config))], n=1)
            raise ConfigError(
                f"--get {key}: unknown config field. "
                + (f"Did you mean {near[0]}?" if near else "`iwsft config` lists them; use one of these.")
            )
        value = value[part]
    return value


def _needs_sidecar(config: Config) -> bool:
    """Whether training reads cached reference log-probs. Imports torch, to load a custom objective."""
    from megatron_iwsft.objectives.custom import find_objective

    return config.reference.source == "cached" and find_objective(config.objective.name).needs_reference
