"""Reading a checkpoint's pickles without running code: by an unpickler that knows only the classes that checkpoints consist of.

Three kinds of files contain pickles, by torch's and Megatron-Core's formats: `.metadata` (what is stored where), `common.pt` (small
values that are the same on all ranks) and, inside `*.distcp`, objects that are not tensors (random states, for example). Megatron-Core
loads them with an unrestricted unpickler, so all of them are checked here first.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_iwsft.errors import CheckpointError

METADATA, COMMON = ".metadata", "common.pt"

# Every class and function of a `.metadata`, on all supported lines of torch and Megatron-Core.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        *(
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "ChunkStorageMetadata",
            "TensorStorageMetadata",
            "TensorProperties",
        ),
        *("BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset", "slice"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return getattr(importlib.import_module(module), name)


def read_metadata(directory: Path) -> Metadata:
    """What is stored where. Raises CheckpointError if the file is damaged or refers to anything but a checkpoint's classes."""
    path = directory / METADATA
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is not loaded: {_first_line(error)}.") from None
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{path} is damaged: it contains {type(found).__name__}, not a checkpoint's metadata.")
    return found


def check_pickles(directory: Path, metadata: Metadata, files: Iterable[str]) -> list[str]:
    """One complaint per pickle in `files` that is not made of tensors and plain values only. Reads objects, no tensors."""
    wanted, complaints = set(files), []
    if COMMON in wanted:
        with open(directory / COMMON, "rb") as file:
            complaints += _complaints(file, str(directory / COMMON))
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(entry, BytesStorageMetadata) and place.relative_path in wanted:
            with open(directory / place.relative_path, "rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            complaints += _complaints(content, f"{index.fqn} in {directory / place.relative_path}")
    return complaints


def _complaints(file: Any, what: str) -> list[str]:
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious pickle can raise anything
        return [f"{what} is not loaded: it does not consist of tensors and plain values only ({_first_line(error)})"]
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
