"""Read and write Megatron's IndexedDataset files (`.bin` + `.idx`) without importing Megatron-Core.

Layout (megatron/core/datasets/indexed_dataset.py): `.bin` holds all sequences end to end; `.idx` holds the magic, version (u64),
dtype code (u8), sequence count (u64), document count (u64), lengths (i32), byte offsets (i64), document boundaries (i64).
Here every sequence is one document.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_iwsft.data.checksums import Checksum, Checksums
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import atomic_write, other_kind, partial_path, publish

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODE_OF = {np.dtype(t): code for code, t in _CODES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20  # sequences whose index is compared at once


def token_dtype(vocab_size: int) -> np.dtype:
    """The token dtype that Megatron's own tools choose for a vocabulary size: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Appends sequences to PREFIX.bin and writes PREFIX.idx on `close`. Both files get their final names only once complete."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._path = _with_suffix(prefix, ".bin")
        self._checksum = Checksum()
        self._file = open(partial_path(self._path), "wb")  # noqa: SIM115 - closed in close()

    def append(self, values: np.ndarray) -> None:
        self.append_many(values, np.array([len(values)]))

    def append_many(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Append n sequences of `lengths` (int [n]), laid end to end in `values`."""
        data = np.ascontiguousarray(values, dtype=self.dtype).data
        self._file.write(data)
        self._checksum.update(data)
        self._lengths.append(np.asarray(lengths, np.int32))

    def close(self) -> Checksums:
        """Finish both files. Returns their checksums."""
        self._file.close()
        index = write_index(self.prefix, np.concatenate([np.zeros(0, np.int32), *self._lengths]), self.dtype)
        publish(partial_path(self._path), self._path)
        out = Checksums()
        out.add(self._path.name, self._checksum)
        out.add(f"{self.prefix.name}.idx", index)
        return out

    def abandon(self) -> None:
        """Close the file, leaving it under its temporary name."""
        with contextlib.suppress(OSError):  # on a full disk, what is still buffered cannot be written
            self._file.close()


def write_index(prefix: Path, lengths: np.ndarray, dtype: np.dtype) -> Checksum:
    """Write PREFIX.idx for sequences of `lengths` (int32 [n]) laid end to end in PREFIX.bin. Returns its checksum."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths) * np.dtype(dtype).itemsize
    checksum = Checksum()
    with atomic_write(_with_suffix(prefix, ".idx"), "wb", single_writer=True) as file:
        for part in (
            _HEADER.pack(_MAGIC, _VERSION, _CODE_OF[np.dtype(dtype)], n, n + 1),
            np.asarray(lengths, np.int32).tobytes(),
            starts.astype(np.int64).tobytes(),
            np.arange(n + 1, dtype=np.int64).tobytes(),
        ):
            file.write(part)
            checksum.update(part)
    return checksum


def check_own_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file; a link could lead to a file that belongs to something else."""
    try:
        kind = other_kind(path, follow_links=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing. Restore it from a copy, or shard the records again.") from None
    if kind is not None:
        raise DataError(f"{path} is {kind}. A corpus consists of regular files: replace it by a copy of the file.")


@dataclass(frozen=True)
class SequenceIndex:
    """Where each of n sequences is, in elements: lengths int32 [n], starts int64 [n]."""

    lengths: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(lengths: np.ndarray) -> SequenceIndex:
        """Of sequences laid end to end."""
        return SequenceIndex(lengths, np.cumsum(lengths, dtype=np.int64) - lengths)

    @property
    def end(self) -> int:
        return int(self.starts[-1] + self.lengths[-1]) if len(self.lengths) else 0


class IndexedReader:
    """Sequences read from disk one at a time: `reader[i]` is a read-only array; `lengths`, int32 [n], and `starts`, int64 [n].

    Lengths and starts are counted in elements. index: what PREFIX.idx says, where it has been read already; several readers can share it.
    Raises DataError if a file is missing, truncated, not an IndexedDataset, of none of `dtypes`, or if its sequences do not lie end to
    end. PREFIX.bin is not mapped into memory: if it is truncated later, reading it raises DataError, whereas access to a mapping would
    end the process with SIGBUS.
    """

    def __init__(
        self, prefix: Path, dtypes: Sequence[type[np.generic]] = (), *, index: SequenceIndex | None = None
    ) -> None:
        path, self.path = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        try:
            check_own_file(path)
            check_own_file(self.path)
            self.dtype, n = _read_header(path)
            if dtypes and self.dtype not in [np.dtype(d) for d in dtypes]:
                names = " or ".join(np.dtype(d).name for d in dtypes)
                raise DataError(f"{path} is damaged: it says {self.dtype.name} where {names} is expected.")
            index = index or SequenceIndex.of(_read_lengths(path, self.dtype, n))
            self.lengths, self.starts = index.lengths, index.starts
            expected = index.end * self.dtype.itemsize
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - stays open for the lifetime of this object
            found = os.fstat(self._file.fileno()).st_size
            if found != expected:
                raise DataError(f"{self.path} has {found} bytes, but its index says {expected}. Create it again.")
        except OSError as error:
            raise DataError(
                f"{error.filename or prefix} cannot be read: {error.strerror}. Copy or create it again."
            ) from None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        size, at = int(self.lengths[i]) * self.dtype.itemsize, int(self.starts[i]) * self.dtype.itemsize
        content = b""
        while len(content) < size:  # one call reads at most 2 GiB
            try:
                part = os.pread(self._file.fileno(), size - len(content), at + len(content))
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}. Copy or create it again.") from None
            if not part:
                raise DataError(f"{self.path} became shorter after it was opened. Restore it and start again.")
            content = content + part if content else part
        return np.frombuffer(content, self.dtype)


def index_differs(prefix: Path, lengths: np.ndarray) -> bool:
    """Whether PREFIX.idx is of other sequences than those of `lengths`. Reads a part at a time. Raises as `IndexedReader`."""
    path = _with_suffix(prefix, ".idx")
    check_own_file(path)
    dtype, n = _read_header(path)
    return n != len(lengths) or not _describes(path, dtype, lengths)


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """Dtype and number of the sequences. Raises DataError unless the file has as many as its header says."""
    with open(path, "rb") as file:
        raw, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if size < _HEADER.size:
        raise DataError(f"{path} is truncated: it has only {size} bytes. Create it again.")
    magic, version, code, n, _ = _HEADER.unpack(raw)
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise DataError(f"{path} is not a Megatron index file of version {_VERSION}. Copy or create it again.")
    if size < _HEADER.size + 12 * n:
        raise DataError(f"{path} is truncated: its header says {n} sequences. Create it again.")
    return np.dtype(_CODES[code]), n


def _read_lengths(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    """Lengths of n sequences, int32. Raises DataError unless the index describes sequences laid end to end."""
    lengths = np.fromfile(path, np.int32, n, offset=_HEADER.size)
    if (lengths < 0).any() or not _describes(path, dtype, lengths):
        raise DataError(f"{path} is damaged: its sequences do not lie end to end. Create it again.")
    return lengths


def _describes(path: Path, dtype: np.dtype, lengths: np.ndarray) -> bool:
    """Whether an index with a valid header has these lengths, and the offsets of such sequences laid end to end."""
    n, end = len(lengths), 0
    with open(path, "rb") as file:
        for first in range(0, n, _BLOCK):
            known = lengths[first : first + _BLOCK]
            file.seek(_HEADER.size + 4 * first)
            found = np.fromfile(file, np.int32, len(known))
            file.seek(_HEADER.size + 4 * n + 8 * first)
            offsets = np.fromfile(file, np.int64, len(known))
            ends = end + np.cumsum(known, dtype=np.int64)
            if not (np.array_equal(found, known) and np.array_equal(offsets, (ends - known) * dtype.itemsize)):
                return False
            end = int(ends[-1])
    return True


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
