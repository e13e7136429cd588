"""manifest.json of a corpus: its schema, and reading and writing it. A directory that has one is complete."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

import numpy as np
from pydantic import AfterValidator, Field, StringConstraints
from typing_extensions import TypedDict

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import read_regular, write_json
from megatron_iwsft.utils.json_files import (
    KEEP_UNKNOWN_KEYS,
    PlainName,
    PlainPath,
    check_json,
    is_regular_file,
    parse_json,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_SUFFIXES = (".bin", ".idx", ".mask.bin", ".mask.idx", ".meta.parquet")  # files of a shard
_AGAIN = "Shard the records again."

Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# A file's SHA-256 of each block (`checksums.py`), at least two of them.
BlockSums = Annotated[list[Sha256], Field(min_length=2)]


class _Tokenizer(TypedDict):
    fingerprint: str
    vocab_size: Annotated[int, Field(gt=0, lt=2**31)]


class _Template(TypedDict):
    hash: str
    source: str


def _checked_date(text: str) -> str:
    datetime.date.fromisoformat(text)
    return text


def _checked_option(pair: list[str]) -> list[str]:
    json.loads(pair[1])
    return pair


_Date = Annotated[str, AfterValidator(_checked_date)]
# (name, value as JSON) of a template's variable.
_Option = Annotated[list[str], Field(min_length=2, max_length=2), AfterValidator(_checked_option)]


class _Rendering(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    date: NotRequired[_Date]
    options: NotRequired[list[_Option]]
    thinking: NotRequired[list[str]]


class _Record(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    rendering: NotRequired[_Rendering]


class _Settings(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    template: str
    record: NotRequired[_Record]


class _Counts(TypedDict):
    trajectories: Count
    tokens: Count
    trained_tokens: Count
    dropped: Count


_Percentiles = TypedDict("_Percentiles", dict.fromkeys(("0", "5", "25", "50", "75", "95", "100"), float))  # type: ignore[misc]


class _Distribution(TypedDict):
    mean: float
    percentiles: _Percentiles


class _Shard(TypedDict):
    name: PlainName


class _Input(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    name: str
    records: NotRequired[Count]  # lines that are not blank, or rows


class _Manifest(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    format_version: int
    run: str
    tokenizer: _Tokenizer
    template: _Template | None
    settings: _Settings
    inputs: NotRequired[list[_Input]]
    counts: _Counts
    sources: NotRequired[dict[str, Count]]
    dropped: dict[str, Count]
    unchecked: NotRequired[dict[str, Count]]
    unused_keys: NotRequired[dict[str, Count]]
    lengths: _Distribution | None
    scores: _Distribution | None
    shards: list[_Shard]
    files: dict[PlainPath, Sha256]
    blocks: NotRequired[dict[PlainPath, BlockSums]]


def shard_files(name: str) -> list[str]:
    """Names of the files of shard `name`."""
    return [f"{name}{suffix}" for suffix in _SUFFIXES]


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """(manifest, SHA-256 of its file). Raises DataError if it is missing, damaged or of an unsupported format version."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DataError(f"there is no corpus at {directory}. Create one with `iwsft shard`.")
    if not is_regular_file(path):
        raise DataError(
            f"{directory} has no {MANIFEST}: sharding was interrupted. Run the same `iwsft shard` command again to finish it."
        )
    content = read_regular(path)
    found = parse_json(content, dict[str, Any], DataError, where=str(path), advice=_AGAIN)
    version = found.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this version of iwsft reads only version {FORMAT_VERSION}. {_AGAIN}"
        )
    return check_manifest(found, where=str(path), advice=_AGAIN), hashlib.sha256(content).hexdigest()


def check_manifest(found: dict[str, Any], *, where: str, advice: str) -> dict[str, Any]:
    """`found`, checked against the schema. Raises DataError."""
    manifest = check_json(found, _Manifest, DataError, where=where, advice=advice)
    names = [shard["name"] for shard in manifest["shards"]]
    wanted = {file for name in names for file in shard_files(name)}
    unlisted = sorted(wanted - set(manifest["files"])) + sorted(
        set(manifest.get("blocks", {})) - set(manifest["files"])
    )
    if len(set(names)) < len(names):
        raise DataError(f"{where} is damaged: it lists a shard twice. {advice}")
    if unlisted:
        raise DataError(f"{where} is damaged: it has no checksum of {unlisted[0]}. {advice}")
    return dict(manifest)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a corpus or of a sidecar, atomically."""
    write_json(directory / MANIFEST, manifest, sort_keys=True, single_writer=True)


def distribution(values: np.ndarray) -> dict[str, Any] | None:
    """Mean and percentiles (0 and 100 are minimum and maximum) of `values`, for the manifest; None if `values` is empty."""
    if not len(values):
        return None
    quantiles = (0, 5, 25, 50, 75, 95, 100)
    return {
        "mean": float(np.mean(values, dtype=np.float64)),
        "percentiles": {str(q): float(v) for q, v in zip(quantiles, np.percentile(values, quantiles), strict=True)},
    }
