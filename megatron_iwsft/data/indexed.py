"""Read and write Megatron's IndexedDataset files (`.bin` + `.idx`) without importing Megatron-Core.

Layout (megatron/core/datasets/indexed_dataset.py): `.bin` holds all sequences end to end; `.idx` holds the magic, version (u64),
dtype code (u8), sequence count (u64), document count (u64), lengths (i32), byte offsets (i64), document boundaries (i64).
Here every sequence is one document.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import atomic_write, partial_path, publish

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
        self._digest = hashlib.sha256()
        self._file = open(partial_path(self._path), "wb")  # noqa: SIM115 - closed in close()

    def append(self, values: np.ndarray) -> None:
        self.append_many(values, np.array([len(values)]))

    def append_many(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Append n sequences of `lengths` (int [n]), laid end to end in `values`."""
        data = np.ascontiguousarray(values, dtype=self.dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(np.asarray(lengths, np.int32))

    def close(self) -> dict[str, str]:
        """Finish both files. Returns file name → SHA-256."""
        self._file.close()
        index = write_index(self.prefix, np.concatenate([np.zeros(0, np.int32), *self._lengths]), self.dtype)
        publish(partial_path(self._path), self._path)
        return {self._path.name: self._digest.hexdigest(), f"{self.prefix.name}.idx": index}

    def abandon(self) -> None:
        """Close the file, leaving it under its temporary name."""
        self._file.close()


def write_index(prefix: Path, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write PREFIX.idx for sequences of `lengths` (int32 [n]) laid end to end in PREFIX.bin. Returns its SHA-256."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths) * np.dtype(dtype).itemsize
    digest = hashlib.sha256()
    with atomic_write(_with_suffix(prefix, ".idx"), "wb", single_writer=True) as file:
        for part in (
            _HEADER.pack(_MAGIC, _VERSION, _CODE_OF[np.dtype(dtype)], n, n + 1),
            np.asarray(lengths, np.int32).tobytes(),
            starts.astype(np.int64).tobytes(),
            np.arange(n + 1, dtype=np.int64).tobytes(),
        ):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


class IndexedReader:
    """Memory-mapped sequences: `reader[i]` is a read-only view, `reader.lengths` is int32 [n].

    Raises DataError if a file is missing, truncated or not an IndexedDataset.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        try:
            raw = index.read_bytes()
            if len(raw) < _HEADER.size:
                raise DataError(f"{index} is truncated: it has only {len(raw)} bytes. Create it again.")
            magic, version, code, n, _ = _HEADER.unpack_from(raw)
            if magic != _MAGIC or version != _VERSION or code not in _CODES:
                raise DataError(f"{index} is not a Megatron index file of version {_VERSION}.")
            if len(raw) < _HEADER.size + 12 * n:
                raise DataError(f"{index} is truncated: its header says {n} sequences. Create it again.")
            self.lengths = np.frombuffer(raw, np.int32, n, _HEADER.size)
            dtype = np.dtype(_CODES[code])
            self._starts = np.frombuffer(raw, np.int64, n, _HEADER.size + 4 * n) // dtype.itemsize
            expected = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
            found = data.stat().st_size
            if found != expected:
                raise DataError(f"{data} has {found} bytes, but its index says {expected}. Create it again.")
            self._data = np.memmap(data, dtype, mode="r") if found else np.zeros(0, dtype)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing.") from None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = self._starts[i]
        return self._data[start : start + self.lengths[i]]


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
