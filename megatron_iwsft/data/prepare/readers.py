"""Input files → blocks of records, in order: JSONL (plain, gzip, zstd) or Parquet.

Where a block ends depends on the file alone, and nothing downstream depends on it at all.
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

BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 1024
# A longer line is cut off, and so dropped as damaged: what has no line ends must not fill the memory.
_LONGEST_LINE = 1 << 28
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True)
class Input:
    """One input file; `name` is what the corpus calls it, unique among the inputs and free of this machine's directories."""

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
    """Part of a plain file, in bytes: worker processes read it themselves."""

    offset: int
    size: int


@dataclass(frozen=True)
class Block:
    """Some records in a row: whole lines of JSONL, or a RecordBatch of a Parquet file.

    first     lines (or rows) of the file before the block
    count     lines (or rows) in it
    progress  share of the file's bytes read so far
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
    """The files that paths and glob patterns name, in the order given, each pattern's sorted. Raises DataError if one names none."""
    paths: dict[Path, None] = {}
    for pattern in map(str, patterns):
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"input file {pattern} does not exist.")
        for path in map(Path, found):
            if path.is_dir():
                raise DataError(f"input {path} is a directory. Name its files, for example '{path}/*.jsonl'.")
            paths[path.resolve()] = None
    if not paths:
        raise DataError("no input file was named.")
    top = os.path.commonpath([path.parent for path in paths])
    return [Input(path, path.relative_to(top).as_posix()) for path in paths]


def fingerprint(source: Input) -> str:
    """SHA-256 of a file's size and content: all of it up to 64 MiB, beyond that 64 pieces of 1 MiB spread over it."""
    digest = hashlib.sha256(str(source.size).encode())
    piece = 1 << 20
    steps = range(0, source.size, piece) if source.size <= 64 * piece else [source.size * k // 64 for k in range(64)]
    with open(source.path, "rb") as file:
        for at in [*steps, max(0, source.size - piece)]:
            file.seek(at)
            digest.update(file.read(piece))
    return digest.hexdigest()


def read_blocks(source: Input, skip: int = 0) -> Iterator[Block]:
    """The blocks of a file after its first `skip` lines. Raises DataError if it is damaged or cannot be read."""
    try:
        if source.path.suffix == ".parquet":
            yield from _parquet(source, skip)
        else:
            yield from _jsonl(source, skip)
    except (pa.ArrowInvalid, EOFError) as error:
        raise DataError(f"input file {source.path} is damaged: {error}") from None
    except OSError as error:
        reason = error.strerror or f"damaged or cut off ({error})"
        raise DataError(f"input file {source.path} cannot be read: {reason}.") from None


def _jsonl(source: Input, skip: int) -> Iterator[Block]:
    size = max(1, source.size)
    first = 0
    with open(source.path, "rb") as raw:
        file = _decompressed(raw, source.path.suffix)
        while data := file.read(BLOCK_BYTES):
            whole = True
            if data[-1] != 10:
                rest, whole = _rest_of_line(file)
                data += rest
            count = data.count(b"\n") + (data[-1] != 10)
            passed = min(max(0, skip - first), count)
            if passed < count:
                start = _start_of_line(data, passed)
                payload = (
                    Span(raw.tell() - len(data) + start, len(data) - start) if whole and file is raw else data[start:]
                )
                yield Block(source, first + passed, count - passed, payload, raw.tell() / size)
            first += count


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    kind = _COMPRESSION.get(suffix)
    if kind is None:
        return raw
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind), BLOCK_BYTES)


def _rest_of_line(file: BinaryIO) -> tuple[bytes, bool]:
    """What is left of a line, and whether that is all of it."""
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
        passed = min(max(0, skip - first), batch.num_rows)
        first += batch.num_rows
        if passed < batch.num_rows:
            yield Block(
                source, first - batch.num_rows + passed, batch.num_rows - passed, batch.slice(passed), first / rows
            )


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a Parquet block as records, or what is wrong with one. Fields that are null are left out."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException, ValueError):
        rows = []
        for i in range(batch.num_rows):
            try:
                rows += batch.slice(i, 1).to_pylist()
            except (UnicodeDecodeError, pa.ArrowException, ValueError) as error:
                rows.append(error)
    for row in rows:
        yield row if isinstance(row, Exception) else {k: v for k, v in row.items() if v is not None}
