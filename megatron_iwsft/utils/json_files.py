"""JSON files that somebody else may have written or damaged: read, and checked against a schema, with one message per mistake."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_iwsft.errors import UserError
from megatron_iwsft.utils.files import read_regular

T = TypeVar("T")

KEEP_UNKNOWN_KEYS = ConfigDict(extra="allow", strict=True)  # as a TypedDict's __pydantic_config__
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]


def _plain(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name or os.path.isabs(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _plain_below(name: str) -> str:
    parts = name.split("/")
    if len(parts) > 2:
        raise ValueError(f"{name!r} is not a file name, or one below a directory")
    return "/".join(_plain(part) for part in parts)


# A name that may be joined to the directory of the file that it was read from: it cannot lead outside.
PlainName = Annotated[str, AfterValidator(_plain)]
# The same, possibly below one subdirectory, as in tokenizer/tokenizer.json.
PlainPath = Annotated[str, AfterValidator(_plain_below)]


def read_json(path: Path, schema: type[T], error: type[UserError], *, advice: str) -> T:
    """The content of a JSON file, checked against `schema` (a TypedDict or any type that pydantic knows).

    Raises `error`, with `advice` on what to do, if the file is not UTF-8 JSON or does not fit. Raises FileNotFoundError.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}. {advice}") from None
    return parse_json(content, schema, error, where=str(path), advice=advice)


def parse_json(content: bytes, schema: type[T], error: type[UserError], *, where: str, advice: str) -> T:
    """`read_json` of bytes."""
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise error(f"{where} is damaged: it is not valid JSON. {advice}") from None
    return check_json(value, schema, error, where=where, advice=advice)


def check_json(value: Any, schema: type[T], error: type[UserError], *, where: str, advice: str) -> T:
    """A parsed value, checked against `schema`."""
    try:
        return TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "it"
        raise error(f"{where} is damaged: {key}: {first['msg'][:200]}. {advice}") from None


def fits(value: Any, schema: Any) -> bool:
    """Whether a parsed value fits `schema`."""
    try:
        TypeAdapter(schema).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_regular_file(path: Path) -> bool:
    """Whether `path` is a file itself: not a link, a directory, a FIFO or a device."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
