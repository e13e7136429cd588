"""Read input files in blocks of records, in order: JSONL (plain, gzip, zstd) or Parquet.

Block boundaries depend only on the file, and the corpus does not depend on them.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import other_kind

BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 1024
# A longer line is truncated and therefore dropped as invalid, so that a file without line ends does not fill the memory.
_LONGEST_LINE = 1 << 28
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True)
class Input:
    """One input file. `name` is its path relative to the inputs' common directory; the corpus refers to the file by it."""

    path: Path
    name: str

    @property
    def stem(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def size(self) -> int:
        return self.path.stat().st_size


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
    """

    source: Input
    first: int
    count: int
    payload: Span | bytes | pa.RecordBatch
    progress: float

    def content(self) -> bytes | pa.RecordBatch:
        if not isinstance(self.payload, Span):
            return self.payload
        with open(self.source.path, "rb") as file:
            file.seek(self.payload.offset)
            return file.read(self.payload.size)


def find_inputs(patterns: Sequence[str | Path]) -> list[Input]:
    """Expand paths and glob patterns to files: in the order given, sorted within a pattern. Raises DataError if one matches none."""
    paths: dict[Path, None] = {}
    for pattern in map(str, patterns):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"input file {pattern} does not exist.")
        for path in map(Path, found):
            kind = other_kind(path)
            if kind == "a directory":
                raise DataError(f"input {path} is a directory. Name its files, for example '{path}/*.jsonl'.")
            if kind is not None:
                raise DataError(
                    f"input {path} is {kind}. Inputs are read several times: write the records to a file first."
                )
            paths[path.resolve()] = None
    if not paths:
        raise DataError("no input files were given.")
    top = os.path.commonpath([path.parent for path in paths])
    return [Input(path, path.relative_to(top).as_posix()) for path in paths]


def fingerprint(source: Input) -> str:
    """SHA-256 of a file's size and content; above 64 MiB, of 64 evenly spaced pieces of 1 MiB instead of the full content."""
    digest = hashlib.sha256(str(source.size).encode())
    piece = 1 << 20
    steps = range(0, source.size, piece) if source.size <= 64 * piece else [source.size * k // 64 for k in range(64)]
    with open(source.path, "rb") as file:
        for at in [*steps, max(0, source.size - piece)]:
            file.seek(at)
            digest.update(file.read(piece))
    return digest.hexdigest()


def read_blocks(source: Input, skip: int = 0) -> Iterator[Block]:
    """The blocks of a file after its first `skip` lines (or rows). Raises DataError if it is damaged or cannot be read."""
    try:
        if source.path.suffix == ".parquet":
            yield from _parquet(source, skip)
        else:
            yield from _jsonl(source, skip)
    except OSError as error:
        reason = error.strerror or f"damaged or truncated ({error})"
        raise DataError(f"input file {source.path} cannot be read: {reason}.") from None
    except (pa.ArrowException, EOFError, ValueError, MemoryError) as error:
        raise DataError(f"input file {source.path} is damaged: {error}") from None


def _jsonl(source: Input, skip: int) -> Iterator[Block]:
    size = max(1, source.size)
    first = 0
    with open(source.path, "rb") as raw:
        file = _decompressed(raw, source.path.suffix)
        while data := file.read(BLOCK_BYTES):
            complete = True
            if data[-1] != 10:
                rest, complete = _rest_of_line(file)
                data += rest
            count = data.count(b"\n") + (data[-1] != 10)
            skipped = min(max(0, skip - first), count)
            if skipped < count:
                start = _start_of_line(data, skipped)
                span = Span(raw.tell() - len(data) + start, len(data) - start)
                payload = span if complete and file is raw else data[start:]
                yield Block(source, first + skipped, count - skipped, payload, raw.tell() / size)
            first += count


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    kind = _COMPRESSION.get(suffix)
    if kind is None:
        return raw
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind), BLOCK_BYTES)


def _rest_of_line(file: BinaryIO) -> tuple[bytes, bool]:
    """The rest of the current line, and whether it is complete or was truncated."""
    rest = file.readline(_LONGEST_LINE)
    if len(rest) < _LONGEST_LINE or rest[-1] == 10:
        return rest, True
    while (more := file.readline(_LONGEST_LINE)) and more[-1] != 10:
        pass
    return rest + b"\n", False


def _start_of_line(data: bytes, number: int) -> int:
    at = 0
    for _ in range(number):
        at = data.index(b"\n", at) + 1
    return at


def _parquet(source: Input, skip: int) -> Iterator[Block]:
    file = pq.ParquetFile(source.path)
    rows = max(1, file.metadata.num_rows)
    first = 0
    for batch in file.iter_batches(_BLOCK_ROWS):
        skipped = min(max(0, skip - first), batch.num_rows)
        end = first + batch.num_rows
        if skipped < batch.num_rows:
            yield Block(source, first + skipped, batch.num_rows - skipped, batch.slice(skipped), end / rows)
        first = end


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a Parquet block as records without their null fields, or an exception for a row that cannot be read."""
    try:
        rows: list[Any] = batch.to_pylist()
    except Exception:  # pyarrow raises many kinds: OverflowError for a date after the year 9999 …
        rows = []
        for i in range(batch.num_rows):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except Exception as error:
                rows.append(error)
    for row in rows:
        yield row if isinstance(row, Exception) else {k: v for k, v in row.items() if v is not None}
