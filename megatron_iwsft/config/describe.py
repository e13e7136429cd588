"""Text about the config schema: one line per field, or everything about one field. Taken from the pydantic models."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_iwsft.config.section import Section
from megatron_iwsft.errors import ConfigError

_BOUNDS = {
    "gt": "> {}",
    "ge": "≥ {}",
    "lt": "< {}",
    "le": "≤ {}",
    "min_length": "at least {} items",
    "max_length": "at most {} items",
}
_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}


def describe_schema(schema: type[Section], prefix: str = "") -> str:
    """Every section and field: key, type, default and the first line of its documentation."""
    lines = []
    for key, field in fields(schema, prefix):
        section = section_of(field)
        if section is None:
            lines.append(f"  {key:34} {type_of(field)}; {default_of(field)}")
            lines.append(f"      {summary(field)}")
        else:
            lines += ["", f"{key}: {summary(field)}"]
    return "\n".join(lines).lstrip("\n")


def describe_field(schema: type[Section], key: str) -> str:
    """Everything about the field `key` (section.field), or about a section. Raises ConfigError if there is none."""
    known = dict(fields(schema))
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Sections: {', '.join(schema.model_fields)}."
        raise ConfigError(f"unknown config field {key!r}. {hint}")
    field = known[key]
    section = section_of(field)
    if section is not None:
        return f"{key}: {_text(field)}\n\n{describe_schema(section, f'{key}.')}"
    lines = [type_of(field), default_of(field), "", *_text(field).split("\n")]
    return "\n".join([key, *(f"  {line}".rstrip() for line in lines)])


def fields(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(key, field) of every section and field, a section before its fields, plain fields before sections in it."""
    ordered = sorted(schema.model_fields.items(), key=lambda item: section_of(item[1]) is not None)
    for name, field in ordered:
        yield f"{prefix}{name}", field
        section = section_of(field)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or may hold; None for a plain field."""
    options = get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def type_of(field: FieldInfo) -> str:
    """A field's type, allowed values and bounds, for people."""
    return _name(field.annotation) + _bounds(field.metadata)


def default_of(field: FieldInfo) -> str:
    """`required`, or `default` and the value."""
    if field.is_required():
        return "required"
    return f"default {yaml_text(field.get_default(call_default_factory=True))}"


def yaml_text(value: Any) -> str:
    """A value on one line as YAML would have it; text without quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {yaml_text(v)}" for k, v in value.items()) + "}"
    return str(value)


def summary(field: FieldInfo) -> str:
    """The first line of a field's documentation."""
    return _text(field).partition("\n")[0]


def _text(field: FieldInfo) -> str:
    section = section_of(field)
    return (field.description or (section and section.__doc__) or "").strip()


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(arguments[0]) + _bounds(list(arguments[1:]))
    if origin is Literal:
        return " | ".join(map(yaml_text, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_name, arguments))
    if origin is list:
        return f"list of ({_name(arguments[0])})"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return "mapping"
    return _TYPES.get(annotation, str(annotation))


def _bounds(metadata: list[Any]) -> str:
    """ " > 0" and the like. metadata: constraint objects; inside a union, pydantic's `FieldInfo` around them."""
    flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    found = [
        text.format(yaml_text(getattr(part, name)))
        for part in flat
        for name, text in _BOUNDS.items()
        if getattr(part, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""
