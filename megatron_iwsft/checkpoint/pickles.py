"""Reading a checkpoint's pickles without running code: by an unpickler that knows only the classes that checkpoints consist of.

Three kinds of files contain pickles, by torch's and Megatron-Core's formats: `.metadata` (what is stored where), `common.pt` (small
values that are the same on all ranks) and, inside `*.distcp`, objects that are not tensors (random states, for example). Megatron-Core
and torch load them with an unrestricted unpickler. So all of them are checked here first, which names the file that is wrong, and loaded
under the same restrictions, since another directory may have got the name after the check. Checked as well is the pickle that Transformer
Engine keeps in a tensor, its state of delayed scaling.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeGuard

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_iwsft.errors import CheckpointError

METADATA, COMMON = ".metadata", "common.pt"
# For torch.load, whatever its caller says: yes, and the contrary.
_WEIGHTS_ONLY = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")

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
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreSavePlan",),  # of earlier lines, empty
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


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """In the block, torch reads `.metadata` with the unpickler above, and everything else as tensors and plain values only."""
    from torch.distributed.checkpoint import filesystem

    before, environment = (
        filesystem.pickle,
        {name: os.environ.pop(name) for name in _WEIGHTS_ONLY if name in os.environ},
    )
    restricted: Any = SimpleNamespace(**vars(before) | {"load": lambda file: _Unpickler(file).load()})
    filesystem.pickle, os.environ[_WEIGHTS_ONLY[0]] = restricted, "1"
    try:
        yield
    finally:
        filesystem.pickle = before
        del os.environ[_WEIGHTS_ONLY[0]]
        os.environ.update(environment)


class _ScalingHistory(pickle.Unpickler):
    """Of what Transformer Engine pickles for delayed scaling: the recipe and tensors."""

    _ALLOWED: ClassVar = {
        "transformer_engine.common.recipe": ("DelayedScaling", "Format", "_FormatHelper", "MMParams", "QParams"),
        "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",),
        "torch._utils": ("_rebuild_tensor_v2",),
        "torch": ("Size", "Tensor", "dtype"),
        "collections": ("OrderedDict",),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in (
            "_load_from_bytes",
            "safe_load_from_bytes",
        ):  # torch's unpickles anything; the other is Megatron-Core's
            return lambda content: torch.load(io.BytesIO(content), weights_only=True)
        if name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no state of delayed scaling needs")
        return getattr(importlib.import_module(module), name)


def read_metadata(directory: Path) -> Metadata:
    """What is stored where. Raises CheckpointError if the file is damaged or refers to anything but a checkpoint's classes."""
    path = directory / METADATA
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Check that you may read it, or use another checkpoint."
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is not loaded: {_first_line(error)}. Use another checkpoint of the run."
        ) from None
    if not isinstance(found, Metadata):
        raise CheckpointError(
            f"{path} is damaged: it contains {type(found).__name__}, not a checkpoint's metadata. "
            "Use another checkpoint of the run."
        )
    for name, entry in _entries(found):
        if not _is_well_formed(name, entry):
            raise CheckpointError(
                f"{path} is damaged: its entry {name!r:.200} is of no checkpoint. Use another checkpoint of the run."
            )
    return found


def _entries(metadata: Metadata) -> Iterator[tuple[Any, Any]]:
    for name in ("state_dict_metadata", "storage_data"):
        entries = vars(metadata).get(name)
        yield from entries.items() if isinstance(entries, dict) else [(name, entries)]


def _is_well_formed(name: Any, entry: Any) -> bool:
    """Whether an entry of the metadata has the attributes of its class: an unpickler sets any, of any type."""
    given = getattr(entry, "__dict__", {})
    if isinstance(name, MetadataIndex):
        numbers = given.get("offset"), given.get("length")
        return (
            isinstance(entry, _StorageInfo)
            and isinstance(vars(name).get("fqn"), str)
            and isinstance(given.get("relative_path"), str)
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        )
    if isinstance(entry, BytesStorageMetadata):
        return isinstance(name, str)
    size, chunks, properties = (given.get(key) for key in ("size", "chunks", "properties"))
    return (
        isinstance(name, str)
        and isinstance(entry, TensorStorageMetadata)
        and isinstance(properties, TensorProperties)
        and isinstance(vars(properties).get("dtype"), torch.dtype)
        and _is_size(size)
        and isinstance(chunks, list)
        and all(isinstance(chunk, ChunkStorageMetadata) and _lies_in(vars(chunk), size) for chunk in chunks)
    )


def _lies_in(chunk: dict[str, Any], size: torch.Size) -> bool:
    offsets, sizes = chunk.get("offsets"), chunk.get("sizes")
    return (
        _is_size(offsets)
        and _is_size(sizes)
        and len(offsets) == len(sizes) == len(size)
        and all(at + count <= of for at, count, of in zip(offsets, sizes, size, strict=True))
    )


def _is_size(value: Any) -> TypeGuard[torch.Size]:
    return isinstance(value, torch.Size) and all(count >= 0 for count in value)


class _Inert:
    """Takes the place of any object: it keeps attributes, if they come as a dict, and does nothing."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def append(self, item: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _PlainValues(pickle.Unpickler):
    """Reads numbers, strings and containers; every object, whatever its class, is an inert one."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None  # tensors


def read_arguments(directory: Path, metadata: Metadata, files: Iterable[str]) -> dict[str, Any]:
    """The arguments that Megatron-LM saves: those that are numbers, strings or None. Empty if there are none.

    They are an argparse.Namespace among objects of any class, in `common.pt`, or since Megatron-Core 0.19 in an object beside the tensors
    in one of `files`. No class is imported and no code runs.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(_common_state(directory, metadata, set(files)))) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch compresses nothing
                return {}
            found = _PlainValues(io.BytesIO(archive.read(name))).load()
        arguments = vars((found[0] if isinstance(found, list) else found)["args"])
    except Exception:  # not there, or not written by Megatron-LM
        return {}
    return {name: value for name, value in arguments.items() if _is_argument(value)}


def _is_argument(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, float) or (isinstance(value, str) and len(value) <= 200)


def _common_state(directory: Path, metadata: Metadata, files: set[str]) -> bytes:
    if COMMON in files:
        return (directory / COMMON).read_bytes()
    (place,) = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("common_state/")]
    if place.relative_path not in files:
        return b""
    with open(directory / place.relative_path, "rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


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
        found = torch.load(file, map_location="cpu", weights_only=True)
        if "_extra_state" in what:
            _check_scaling_histories(found)
    except Exception as error:  # a damaged or malicious pickle can raise anything
        return [f"{what} is not loaded: it does not consist of tensors and plain values only ({_first_line(error)})"]
    return []


def _check_scaling_histories(states: Any) -> None:
    """states: what Megatron-Core stores of them, a list of tensors (or None) whose bytes Transformer Engine will unpickle."""
    if not isinstance(states, list) or not all(state is None or isinstance(state, torch.Tensor) for state in states):
        raise pickle.UnpicklingError("it is not a list of tensors")
    for state in states:
        if state is not None and state.numel():
            _ScalingHistory(io.BytesIO(state.numpy().tobytes())).load()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
