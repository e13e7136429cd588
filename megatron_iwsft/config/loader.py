"""Read a config file: YAML, checked against the schema, with `section.key=value` overrides. Error messages name the field."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from megatron_iwsft.config.other_names import OURS
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.files import read_regular

S = TypeVar("S", bound=Section)
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys and reads 1e-5 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:  # what cannot be hashed is refused below
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key!r:.80}, again in line {key_node.start_mark.line + 1}"
                )
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-5, without a dot, as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a config file and apply `section.key=value` overrides, whose values are YAML.

    Raises ConfigError for an unreadable file, invalid YAML, an unknown key (naming the nearest one), or a wrong type or value.
    """
    return read_config(Config, path, overrides or [])


def parse_config(text: str, overrides: list[str], *, where: str) -> Config:
    """Like `load_config`, from text; `where` names it in messages."""
    return _parse(Config, text, overrides, where)


def read_config(schema: type[S], path: str | Path, overrides: list[str]) -> S:
    """Like `load_config`, for any schema."""
    path = Path(path)
    try:
        # /dev: a shell's <(…) is a pipe that is being written.
        content = path.read_bytes() if path.is_relative_to("/dev") else read_regular(path)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read config file {path}: {error.strerror}. Check the path and its permissions."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path} is not UTF-8 text. Save it as UTF-8.") from None
    return _parse(schema, text, overrides, str(path))


def _parse(schema: type[S], text: str, overrides: list[str], where: str) -> S:
    raw = read_yaml(text, where)
    if not isinstance(raw, dict):
        sections = ", ".join(list(schema.model_fields)[:3])
        raise ConfigError(f"{where} must be a mapping with sections ({sections}, …); found {type(raw).__name__}.")
    for override in overrides:
        _apply(raw, override)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error, where)) from None


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text means. Raises ConfigError."""
    try:
        value = yaml.load(text, _Loader)
        _check_size(value, where)
        return value
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply. Remove levels; a config has sections and fields.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{where}{line} is not valid YAML: {getattr(error, 'problem', error)}. "
            "Correct the line or the one before it."
        ) from None
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-45, or a number that Python does not read
        raise ConfigError(
            f"{where} has a value that cannot be read: {error}. Correct it, or put it in quotes."
        ) from None


def _check_size(value: Any, where: str) -> None:
    """Raise ConfigError for what is huge once its aliases are followed: each may repeat what contains it, or a thousand others."""
    waiting, count = [value], 0
    while waiting:
        found = waiting.pop()
        count += 1
        if isinstance(found, int) and found.bit_length() > 1024:  # in hexadecimal, in which Python reads any
            raise ConfigError(f"{where} has a number of {found.bit_length():,} bits. Correct it.")
        if count > _MOST_VALUES:
            raise ConfigError(
                f"{where} has more than {_MOST_VALUES:,} values, with aliases (*name) followed. Remove some of them."
            )
        if isinstance(found, dict):
            waiting.extend(found.values())
        elif isinstance(found, list | tuple | set):
            waiting.extend(found)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value.")
    *sections, last = key.strip().split(".")
    at = raw
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise ConfigError(
                f"override {override!r}: {section} is a value, not a section. "
                "Write section.key=value; `iwsft config` lists the keys."
            )
    at[last] = read_yaml(value, f"override {override!r}")


def _explain(schema: type[Section], error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"])
        found = item.get("input")
        kind = item["type"]
        if kind == "extra_forbidden":
            known = _known_keys(schema, item["loc"][:-1])
            given = str(item["loc"][-1])
            near = [OURS[given]] if given in OURS else difflib.get_close_matches(given, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known keys: {', '.join(known)}."
            lines.append(f"{location} is not a known key.{hint}")
        elif kind == "missing":
            lines.append(f"{location} is missing; it has no default.")
        elif kind == "value_error":
            problem = ": ".join(
                filter(None, [location, str(item["ctx"]["error"])])
            )  # of a whole config: it names the field itself
            lines.append(problem if problem.endswith((".", "?")) else f"{problem}.")
        elif kind in ("model_type", "model_attributes_type"):
            lines.append(
                f"{location} must be a mapping with keys {', '.join(_known_keys(schema, item['loc']))}; found {found!r:.80}."
            )
        else:
            lines.append(f"{location}: {item['msg'][0].lower()}{item['msg'][1:]}; found {found!r:.80}.")
    return f"{where}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])


def _known_keys(schema: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Keys of the section at `location`; none if that is not a section."""
    model: Any = schema
    for part in location:
        # Under a key of a mapping: the type of its values, its last argument.
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else get_args(model)[-1]
        if isinstance(model, types.UnionType):  # a section that may be null
            model = next((option for option in get_args(model) if hasattr(option, "model_fields")), model)
    return list(model.model_fields) if hasattr(model, "model_fields") else []
