"""Megatron's IndexedDataset files (`.bin` + `.idx`), read and written without importing Megatron-Core.

Layout (megatron/core/datasets/indexed_dataset.py): `.bin` is all sequences end to end; `.idx` is the magic, version (u64),
dtype code (u8), sequence count (u64), document count (u64), lengths (i32), byte offsets (i64), document boundaries (i64).
Here every sequence is one document.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np

from megatron_iwsft.errors import DataError

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
    """The dtype that Megatron's own tools choose for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedWriter:
    """Appends sequences to PREFIX.bin and, on `close`, writes PREFIX.idx. The files exist under their names only once whole."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._partial = _with_suffix(prefix, ".bin.partial")
        self._digest = hashlib.sha256()
        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed in close()

    def append(self, values: np.ndarray) -> None:
        self.append_many(values, np.array([len(values)]))

    def append_many(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Several sequences, end to end in `values`, of `lengths` (int [n])."""
        data = np.ascontiguousarray(values, dtype=self.dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(np.asarray(lengths, np.int32))

    def close(self) -> dict[str, str]:
        """Finish both files; returns their names with their SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = write_index(self.prefix, np.concatenate([np.zeros(0, np.int32), *self._lengths]), self.dtype)
        os.replace(self._partial, _with_suffix(self.prefix, ".bin"))
        return {f"{self.prefix.name}.bin": self._digest.hexdigest(), f"{self.prefix.name}.idx": index}

    def abandon(self) -> None:
        """Close the file without giving it its name."""
        self._file.close()


def write_index(prefix: Path, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write PREFIX.idx for sequences of `lengths` (int32 [n]) laid end to end in PREFIX.bin; returns its SHA-256."""
    n = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = (ends - lengths) * np.dtype(dtype).itemsize
    partial = _with_suffix(prefix, ".idx.partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as file:
        for part in (
            _HEADER.pack(_MAGIC, _VERSION, _CODE_OF[np.dtype(dtype)], n, n + 1),
            np.asarray(lengths, np.int32).tobytes(),
            starts.astype(np.int64).tobytes(),
            np.arange(n + 1, dtype=np.int64).tobytes(),
        ):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, _with_suffix(prefix, ".idx"))
    return digest.hexdigest()


class IndexedReader:
    """Memory-mapped sequences: `reader[i]` is a read-only view, `reader.lengths` int32 [n]."""

    def __init__(self, prefix: Path) -> None:
        index, data = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        try:
            raw = index.read_bytes()
            if len(raw) < _HEADER.size:
                raise DataError(f"{index} is truncated: {len(raw)} bytes. Make it again.")
            magic, version, code, n, _ = _HEADER.unpack_from(raw)
            if magic != _MAGIC or version != _VERSION or code not in _CODES:
                raise DataError(f"{index} is not a Megatron index of version {_VERSION}.")
            if len(raw) < _HEADER.size + 12 * n:
                raise DataError(f"{index} is truncated: {n} sequences are announced. Make it again.")
            self.lengths = np.frombuffer(raw, np.int32, n, _HEADER.size)
            dtype = np.dtype(_CODES[code])
            self._starts = np.frombuffer(raw, np.int64, n, _HEADER.size + 4 * n) // dtype.itemsize
            expected = int(self.lengths.sum(dtype=np.int64)) * dtype.itemsize
            found = data.stat().st_size
            if found != expected:
                raise DataError(f"{data} holds {found} bytes where its index announces {expected}. Make it again.")
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
