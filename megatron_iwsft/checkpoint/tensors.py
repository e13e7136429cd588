"""Single tensors of a checkpoint made at any layout, read in one process without Megatron-Core or a process group."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.info import CheckpointInfo, one_line
from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.checkpoint.pickles import METADATA, read_metadata
from megatron_iwsft.errors import CheckpointError, DamageError
from megatron_iwsft.hf.adapter_mapping import adapter_rows
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import named_rows


class StoredTensors:
    """Single tensors of a torch_dist directory, unsharded, read without Megatron-Core or a process group.

    metadata: what is stored where (pickles.py). files: the directory's, which are trusted; the metadata may lead to no others.
    """

    def __init__(self, directory: Path, metadata: Metadata, files: Collection[str]) -> None:
        self.directory = directory
        self._metadata, self._allowed = metadata, frozenset(files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor stored, by name."""
        entries = self._metadata.state_dict_metadata.items()
        return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The full tensor `name`, or one index of its first dimension. Raises CheckpointError if there is none or its file is damaged.

        Peak memory: the tensor, and one rank's shard of it if there are several.
        """
        another = "Use another checkpoint of the run."
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.directory} has no tensor {name}. Use a checkpoint of this model.")
        size = entry.size if index is None else entry.size[1:]
        out, missing = None, math.prod(size)
        for chunk in entry.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if index is not None and not offsets[0] <= index < offsets[0] + sizes[0]:
                continue
            try:
                shard = self._shard(name, chunk.offsets).view(chunk.sizes)
            except (Exception, CheckpointException) as error:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} cannot be read: {one_line(error)}. {another}"
                ) from None
            if index is not None:
                shard, offsets, sizes = shard[index - offsets[0]], offsets[1:], sizes[1:]
            if shard.shape == size:
                return shard
            if out is None:
                out = torch.empty(size, dtype=entry.properties.dtype)
            place = tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))
            out[place] = shard
            missing -= shard.numel()
        if out is None or missing:  # else parts would be what the memory held before
            raise CheckpointError(f"{self.directory}: parts of tensor {name} are missing. {another}")
        return out

    def _shard(self, name: str, offsets: torch.Size) -> Tensor:
        """One stored shard. `torch.distributed.checkpoint.load` would need a second tensor of its size."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        place = self._metadata.storage_data[MetadataIndex(name, offsets)]
        if place.relative_path not in self._allowed:
            raise ValueError(f"it is in {place.relative_path!r:.200}, which is not a file of the checkpoint")
        with open(self.directory / place.relative_path, "rb") as file:
            part: Any = _Part(file, place.offset, place.length)
            return torch.load(part, map_location="cpu", weights_only=True)


class CheckpointTensors(StoredTensors):
    """Single tensors of a checkpoint. Each of its files is hashed before its first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = CheckpointInfo.read(directory).files
        self._checked: set[str] = set()
        integrity.check_trust(directory, [*self._files, INFO])
        self._check(METADATA)
        super().__init__(directory, read_metadata(directory), self._files)
        self._where: dict[str, set[str]] = {}
        for index, stored in self._metadata.storage_data.items():
            self._where.setdefault(index.fqn, set()).add(stored.relative_path)

    def read(self, name: str, index: int | None = None) -> Tensor:
        for file in sorted(self._where.get(name, ())):
            self._check(file)
        return super().read(name, index)

    def _check(self, file: str) -> None:
        """Hash a file before its first use."""
        if file not in self._checked:
            if file not in self._files:
                raise CheckpointError(
                    f"{self.directory / file} is not among the files that this checkpoint was written with. "
                    "Remove it, or use another checkpoint."
                )
            complaints = integrity.damage(self.directory, self._files, [file])
            if complaints:
                raise DamageError(f"{complaints[0]}. {integrity.ADVICE}")
            self._checked.add(file)


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        got = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += got
        return got


def hugging_face_reader(
    directory: Path, architecture: Architecture, adapters: AdapterSettings | None = None
) -> tuple[Callable[[str], Tensor], list[str]]:
    """A function from Hugging Face tensor name to tensor, and the names in the order that reads each parameter once.

    adapters: those that the checkpoint holds, by PEFT's names, None for one of the model's weights.
    """
    tensors = CheckpointTensors(directory)
    rows = named_rows(architecture) if adapters is None else adapter_rows(architecture, adapters)
    owner = {hf: (name, row) for name, row in rows for hf in row.hf}
    cache: dict[str, list[Tensor]] = {}

    def read(hf: str) -> Tensor:
        name, row = owner[hf]
        if name not in cache:
            cache.clear()
            cache[name] = row.layout.split(tensors.read(name))
        return cache[name][row.hf.index(hf)]

    return read, list(owner)
