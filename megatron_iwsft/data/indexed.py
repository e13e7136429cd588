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
        raise DataError(f"{path} is missing.") from None
    if kind is not None:
        raise DataError(f"{path} is {kind}. A corpus consists of regular files: replace it by a copy of the file.")


class IndexedReader:
    """Sequences read from disk one at a time: `reader[i]` is a read-only array; `lengths`, int32 [n], and `starts`, int64 [n].

    Lengths and starts are counted in elements. Raises DataError if a file is missing, truncated, not an IndexedDataset, of none of
    `dtypes`, or if its sequences do not lie end to end. The files are not mapped into memory: if one is truncated later, reading it
    raises DataError, whereas access to a mapping would end the process with SIGBUS.
    """

    def __init__(self, prefix: Path, dtypes: Sequence[type[np.generic]] = ()) -> None:
        index, self.path = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        try:
            check_own_file(index)
            check_own_file(self.path)
            self.lengths, self.dtype = _read_index(index)
            if dtypes and self.dtype not in [np.dtype(d) for d in dtypes]:
                names = " or ".join(np.dtype(d).name for d in dtypes)
                raise DataError(f"{index} is damaged: it says {self.dtype.name} where {names} is expected.")
            self.starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
            expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
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


def _read_index(path: Path) -> tuple[np.ndarray, np.dtype]:
    """Lengths and dtype of the sequences. Raises DataError unless the index describes sequences laid end to end."""
    raw = path.read_bytes()
    if len(raw) < _HEADER.size:
        raise DataError(f"{path} is truncated: it has only {len(raw)} bytes. Create it again.")
    magic, version, code, n, _ = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise DataError(f"{path} is not a Megatron index file of version {_VERSION}. Copy or create it again.")
    if len(raw) < _HEADER.size + 12 * n:
        raise DataError(f"{path} is truncated: its header says {n} sequences. Create it again.")
    lengths, dtype = np.frombuffer(raw, np.int32, n, _HEADER.size), np.dtype(_CODES[code])
    offsets = np.frombuffer(raw, np.int64, n, _HEADER.size + 4 * n)
    if (lengths < 0).any() or not np.array_equal(
        offsets, (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    ):
        raise DataError(f"{path} is damaged: its sequences do not lie end to end. Create it again.")
    return lengths, dtype


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
