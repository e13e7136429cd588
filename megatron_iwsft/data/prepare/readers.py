"""Read input files in blocks of records, in order: JSONL (plain, gzip, zstd) or Parquet.

Block boundaries depend only on the file, and the corpus does not depend on them.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.data.prepare.messages import Dropped
from megatron_iwsft.data.prepare.records import parse
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import other_kind

BLOCK_BYTES = 1 << 20
LONGEST_RECORD = 1 << 24  # bytes, by default
_BLOCK_ROWS = 1024
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# What a file that is no plain text begins with, and what to do about it.
_OTHER_CONTENT = {
    b"\x1f\x8b": "gzip; give it a name that ends in .jsonl.gz",
    b"\x28\xb5\x2f\xfd": "zstd; give it a name that ends in .jsonl.zst",
    b"PAR1": "Parquet; give it a name that ends in .parquet",
    b"BZh": "bzip2; decompress it, or compress it with gzip or zstd",
    b"\xfd7zXZ\x00": "xz; decompress it, or compress it with gzip or zstd",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xff\xff\xff\xff": "an Arrow file of a saved data set; write it as Parquet: datasets.load_from_disk(…).to_parquet(…)",
}
_ARRAY = re.compile(rb"\s*\[\s*(\{|\Z)")  # how a file begins that is one JSON array of records
_SUFFIXES = re.compile(r"(\.(jsonl|ndjson|json|parquet|gz|zstd?))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Input:
    """One input file. `name` is its path relative to the inputs' common directory; the corpus refers to the file by it."""

    path: Path
    name: str

    @property
    def stem(self) -> str:
        return _SUFFIXES.sub("", self.name) or self.name

    @property
    def size(self) -> int:
        return self.state[0]

    @property
    def state(self) -> tuple[int, int]:
        """Size in bytes, and when the file was last changed, in nanoseconds. Raises DataError if it cannot be read."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Span:
    """A byte range of an uncompressed file, read by the worker processes themselves."""

    offset: int
    size: int


@dataclass(frozen=True)
class Block:
    """Consecutive records: complete lines of JSONL, or a RecordBatch of a Parquet file.

    first     number of lines (or rows) of the file before the block
    count     number of lines (or rows) in the block
    progress  fraction of the file read so far
    cut       length in bytes of the last line, if it is too long to be read and only its beginning is here; else 0
    only_keys   it is read for the keys of its messages only: the run is refused
    """

    source: Input
    first: int
    count: int
    payload: Span | bytes | pa.RecordBatch
    progress: float
    cut: int = 0
    only_keys: bool = False

    def content(self) -> bytes | pa.RecordBatch:
        """The payload. Raises DataError if the file cannot be read any more."""
        if not isinstance(self.payload, Span):
            return self.payload
        try:
            with open(self.source.path, "rb") as file:
                file.seek(self.payload.offset)
                data = file.read(self.payload.size)
        except OSError as error:
            raise _unreadable(self.source.path, error) from None
        if len(data) < self.payload.size:
            raise DataError(f"input file {self.source.path} was truncated while it was read. Run the command again.")
        return data


def find_inputs(patterns: Sequence[str | Path]) -> list[Input]:
    """Expand paths and glob patterns to files: in the order given, sorted within a pattern. Raises DataError if one matches none."""
    paths: dict[Path, None] = {}
    for pattern in map(str, patterns):
        for path in map(Path, _expand(pattern)):
            try:
                kind = other_kind(path)
                resolved = path.resolve()
            except (OSError, RuntimeError) as error:  # Python raises RuntimeError for some loops of links
                raise _unreadable(path, error) from None
            if kind == "a directory":
                raise DataError(f"input {path} is a directory. Name its files, for example '{path}/*.jsonl'.")
            if kind is not None:
                raise DataError(
                    f"input {path} is {kind}. Inputs are read several times: write the records to a file first."
                )
            paths[resolved] = None
    if not paths:
        raise DataError("no input files were given. Name the files of records, for example 'data/*.jsonl'.")
    top = os.path.commonpath([path.parent for path in paths])
    return [Input(path, path.relative_to(top).as_posix()) for path in paths]


def _expand(pattern: str) -> list[str]:
    """The paths that a pattern matches, sorted; a pattern that is itself the name of something matches only that."""
    if os.path.lexists(pattern):
        return [pattern]
    if "**" in pattern:
        for directory in glob.glob(pattern[: pattern.index("**")] or "."):
            _refuse_loop(directory, ())
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"input file {pattern} does not exist. Check the path.")
    return found


def _refuse_loop(directory: str, above: tuple[tuple[int, int], ...]) -> None:
    """Raise DataError if a link below `directory` leads back to a directory above it: `**` would follow it again and again."""
    try:
        status = os.stat(directory)
        here = status.st_dev, status.st_ino
        names = [entry.path for entry in os.scandir(directory) if entry.is_dir()]
    except OSError:
        return  # as glob does
    if here in above:
        raise DataError(
            f"{directory} is a symbolic link that leads back to a directory above it. Name the files without **."
        )
    for name in names:
        _refuse_loop(name, (*above, here))


def fingerprint(source: Input) -> str:
    """SHA-256 of a file's size and content; above 64 MiB, of 64 evenly spaced pieces of 1 MiB instead of the full content.

    Raises DataError if it cannot be read.
    """
    try:
        digest = hashlib.sha256(str(source.size).encode())
        piece = 1 << 20
        size = source.size
        steps = range(0, size, piece) if size <= 64 * piece else [size * k // 64 for k in range(64)]
        with open(source.path, "rb") as file:
            for at in [*steps, max(0, size - piece)]:
                file.seek(at)
                digest.update(file.read(piece))
    except OSError as error:
        raise _unreadable(source.path, error) from None
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or f"damaged or truncated ({error})"
    return DataError(f"input file {path} cannot be read: {reason}. Replace it, or leave it out of the inputs.")


def read_blocks(source: Input, skip: int = 0, *, longest: int = LONGEST_RECORD) -> Iterator[Block]:
    """The blocks of a file after its first `skip` lines (or rows). Raises DataError if it is damaged or cannot be read.

    A line of more than `longest` bytes is not read into memory; `numbered_records` drops it.
    """
    try:
        if source.path.suffix == ".parquet":
            yield from _parquet(source, skip)
        else:
            yield from _jsonl(source, skip, longest)
    except OSError as error:
        raise _unreadable(source.path, error) from None
    except (pa.ArrowException, EOFError, ValueError, MemoryError) as error:
        raise DataError(f"input file {source.path} is damaged: {error}. Download or create it again.") from None


def _jsonl(source: Input, skip: int, longest: int) -> Iterator[Block]:
    size = max(1, source.size)
    first = 0
    with open(source.path, "rb") as raw:
        file = _decompressed(raw, source.path)
        while data := file.read(BLOCK_BYTES):
            cut = 0
            if data[-1] != 10:
                rest, cut = _rest_of_line(file, longest, len(data) - data.rfind(b"\n") - 1)
                data += rest
            count = data.count(b"\n") + (data[-1] != 10)
            skipped = min(max(0, skip - first), count)
            if skipped < count:
                start = _start_of_line(data, skipped)
                span = Span(raw.tell() - len(data) + start, len(data) - start)
                payload = span if file is raw and not cut else data[start:]
                yield Block(source, first + skipped, count - skipped, payload, raw.tell() / size, cut)
            first += count


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    kind = _COMPRESSION.get(path.suffix)
    file = raw
    if kind is not None:
        file = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind), BLOCK_BYTES)
    begin = file.peek(64)[:64]
    for magic, what in _OTHER_CONTENT.items():
        if begin.startswith(magic):
            raise DataError(
                f"input file {path} is {what}. "
                "Convert it to JSONL or Parquet; files may be compressed with gzip or zstd."
            )
    if _ARRAY.match(begin.partition(b"\n")[0]):
        raise DataError(
            f"input file {path} is one JSON array, or has arrays instead of records. Write one record per line, as "
            f"jq -c '.[]' {path} does."
        )
    return file


def _rest_of_line(file: BinaryIO, longest: int, begun: int) -> tuple[bytes, int]:
    """(the rest of the current line, 0), or (nothing, the line's length) if it has more than `longest` bytes; `begun` were read."""
    rest = file.readline(max(1, longest + 2 - begun))  # with its line break
    length = begun + len(rest.rstrip(b"\n"))
    if length <= longest:
        return rest, 0
    while rest and rest[-1] != 10:
        rest = file.readline(BLOCK_BYTES)
        length += len(rest.rstrip(b"\n"))
    return b"", length


def _start_of_line(data: bytes, number: int) -> int:
    at = 0
    for _ in range(number):
        at = data.index(b"\n", at) + 1
    return at


def _parquet(source: Input, skip: int) -> Iterator[Block]:
    file = pq.ParquetFile(source.path)
    rows = max(1, file.metadata.num_rows)
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    row_bytes = max([1, *(group.total_byte_size // max(1, group.num_rows) for group in groups)])
    first = 0
    for batch in file.iter_batches(max(1, min(_BLOCK_ROWS, 8 * BLOCK_BYTES // row_bytes))):
        skipped = min(max(0, skip - first), batch.num_rows)
        end = first + batch.num_rows
        if skipped < batch.num_rows:
            yield Block(source, first + skipped, batch.num_rows - skipped, batch.slice(skipped), end / rows)
        first = end


def numbered_records(block: Block, *, longest: int = LONGEST_RECORD) -> Iterator[tuple[int, dict[str, Any] | Dropped]]:
    """(line number, record or why it was dropped) of each line that is not blank, or row. None of more than `longest` bytes is parsed."""
    payload = block.content()
    if not isinstance(payload, bytes):
        yield from enumerate(_rows_of(payload, longest), block.first + 1)
        return
    last = block.first + block.count if block.cut else 0
    for line, content in enumerate(payload.split(b"\n"), block.first + 1):
        if line == last:
            yield line, _too_large(block.cut, longest)
        elif len(content) > longest:
            yield line, _too_large(len(content), longest)
        elif content and not content.isspace():
            try:
                yield line, parse(content)
            except Dropped as dropped:
                yield line, dropped.with_traceback(None)


def _too_large(size: int, longest: int) -> Dropped:
    return Dropped("record too large", f"{size:,} bytes; the maximum is {longest:,}")


def _rows_of(batch: pa.RecordBatch, longest: int) -> Iterator[dict[str, Any] | Dropped]:
    """The rows of a Parquet block as records without their null members, or why a row was dropped."""
    rows: list[Any]
    try:
        rows = [None] * batch.num_rows if batch.nbytes > longest else _records_of(batch)
    except Exception:  # pyarrow raises many kinds
        rows = [None] * batch.num_rows
    for i, row in enumerate(rows):
        found = row if row is not None else _row_of(batch.slice(i, 1), longest)
        yield found if isinstance(found, Dropped) else {k: _as_json(v) for k, v in found.items() if v is not None}


def _row_of(row: pa.RecordBatch, longest: int) -> dict[str, Any] | Dropped:
    """The only row of a batch, read on its own."""
    if row.nbytes > longest:
        return _too_large(row.nbytes, longest)
    out: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            out[name] = _values_of(column)[0]
        except Exception as error:
            return Dropped("cannot be read", f"{name}: {error}")
    return out


def _records_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    names, columns = batch.schema.names, [_values_of(column) for column in batch.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] or [{}] * batch.num_rows


def _values_of(column: pa.Array) -> list[Any]:
    """A column's values, with dates, times and durations at any depth as text, decimals as floats, and maps as objects.

    Python has no date after the year 9999, and pyarrow needs pandas for nanoseconds.
    """
    kind = column.type
    # A time zone that this machine does not know cannot be written: times are in UTC.
    for change in (_without_zone, _text_of_time, _float_of_decimal):
        wanted = _with_leaves(column.type, change)
        column = column if wanted == column.type else column.cast(wanted)
    values = column.to_pylist()
    return [_maps_as_objects(value, kind) for value in values] if "map<" in str(kind) else values


def _maps_as_objects(value: Any, kind: pa.DataType) -> Any:
    """A value of this type with the maps in it, of which pyarrow makes lists of pairs, as objects."""
    if value is None:
        return None
    if pa.types.is_map(kind):
        out = {key: _maps_as_objects(inner, kind.item_type) for key, inner in value}
        if len(out) < len(value):
            raise ValueError("a map has a key twice")
        return out
    if pa.types.is_struct(kind):
        return {field.name: _maps_as_objects(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return [_maps_as_objects(inner, kind.value_type) for inner in value]
    return value


def _without_zone(kind: pa.DataType) -> pa.DataType:
    return pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind


def _text_of_time(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) else kind


def _float_of_decimal(kind: pa.DataType) -> pa.DataType:
    return pa.float64() if pa.types.is_decimal(kind) else kind


def _with_leaves(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with `change` applied to the types of which it is composed."""
    types = pa.types
    if types.is_struct(kind):
        return pa.struct([field.with_type(_with_leaves(field.type, change)) for field in kind])
    if types.is_map(kind):
        return pa.map_(kind.key_type, _with_leaves(kind.item_type, change))
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_leaves(kind.value_type, change)))
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_leaves(kind.value_type, change)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_with_leaves(kind.value_type, change)), kind.list_size)
    if types.is_dictionary(kind):
        inner = _with_leaves(kind.value_type, change)
        return kind if inner == kind.value_type else inner
    return change(kind)


def _as_json(value: Any) -> Any:
    """A value of a Parquet row as JSON would have it: without the null members that other rows' structs brought, at any depth."""
    if isinstance(value, dict):
        out = {key: _as_json(inner) for key, inner in value.items() if inner is not None}
        if out.get("tool_calls"):
            out.setdefault("content", None)  # as the record has it, and as templates look for it
        return out
    if isinstance(value, list) and not (value and isinstance(value[0], str | int | float)):
        return [_as_json(inner) for inner in value]
    return value
