"""Checkpoints: Megatron-Core's `dist_checkpointing` (torch_dist) in directories that are whole or not there.

    checkpoints/
        latest                 name of the newest complete checkpoint, replaced atomically
        step-00000100/
            iwsft.json         step, architecture, layout, resolved config, state of the trainer, and of every other file its
                               size and SHA-256; its presence means complete
            tokenizer/         so that an export needs nothing else
            .metadata, *.distcp, common.pt, metadata.json

A checkpoint is written (checkpoint_writer.py) under `step-….partial` and renamed when every rank is done.

`.metadata`, `common.pt` and parts of `*.distcp` are pickles, by Megatron-Core's and torch's format. So before one is read, its
owner and its checksum are checked (integrity.py).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_iwsft.distributed.context import random_states, set_random_states
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import named_rows
from megatron_iwsft.reference.lagged_copy import LaggedCopy

INFO = "iwsft.json"
LATEST = "latest"
TOKENIZER = "tokenizer"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class CheckpointInfo:
    """What `iwsft.json` says.

    layout: the parallel degrees it was saved at; corpus: fingerprint of the training corpus; trainer: the run's own state (see
    trainer.py); files: name under the directory → size and SHA-256.
    """

    directory: Path
    step: int
    architecture: Architecture
    config: dict[str, Any]
    layout: dict[str, Any]
    template_hash: str | None
    corpus: str | None
    trainer: dict[str, Any]
    files: dict[str, integrity.FileSum]

    @staticmethod
    def read(directory: str | Path) -> CheckpointInfo:
        """Of a checkpoint, or of the latest one in a directory of checkpoints or a run directory.

        Raises CheckpointError if there is none or it is unfinished.
        """
        given = directory = Path(directory)
        if not (directory / INFO).exists():
            for parent in (directory, directory / "checkpoints"):
                if (parent / LATEST).exists():
                    newest = parent / (parent / LATEST).read_text().strip()
                    if not (newest / INFO).exists():  # killed between replacing a checkpoint and pointing at it
                        newest = next(iter(complete_checkpoints(parent)), newest)
                    directory = newest
                    break
        path = directory / INFO
        if not path.exists():
            raise CheckpointError(f"{given} holds no complete checkpoint (there is no {INFO}).")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            if info["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format version {info['format_version']}; this program reads {FORMAT_VERSION}."
                )
            if info.pop("checksum") != info_checksum(info):
                raise CheckpointError(f"{path} is damaged: its checksum is not the one it was written with.")
            return CheckpointInfo(
                directory=directory,
                step=info["step"],
                architecture=Architecture.from_hf(info["architecture"], where=str(path)),
                config=info["config"],
                layout=info["layout"],
                template_hash=info.get("template_hash"),
                corpus=info.get("corpus"),
                trainer=info.get("trainer", {}),
                files=info["files"],
            )
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged.") from None

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file["bytes"] for file in self.files.values())

    def damage(self, *, contents: bool = True) -> list[str]:
        """One complaint a file that is missing, truncated or (with `contents`, which reads all of it) changed."""
        return integrity.damage(self.directory, self.files, sorted(self.files), contents=contents)


def info_checksum(info: dict[str, Any]) -> str:
    """SHA-256 of what `iwsft.json` says, which stands in it too, as `checksum`."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def sharded_state(
    chunks: list[Any],
    optimizer: Any | None,
    schedule: Any | None,
    *,
    random: bool,
    lagged: Sequence[LaggedCopy] = (),
) -> dict[str, Any]:
    """Megatron-Core's sharded state dict of model, optimizer, schedule, lagged copies and, with `random`, this rank's random states."""
    from megatron.core.dist_checkpointing import ShardedObject

    # One key a layer, so that any pipeline split and the exporter find it. Megatron-Core adds this layout's process groups.
    metadata: dict[str, Any] = {"non_homogeneous_layers": True}
    state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        # Chunks of an interleaved pipeline number their layers alike: the optimizer wants tensors, whatever their keys.
        models = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
        state["optimizer"] = sharded_optimizer_state(optimizer, models)
    if schedule is not None:
        state["schedule"] = schedule.state_dict()
    for copy in lagged:
        state[copy.name] = copy.sharded_state(metadata)
    if random:
        state["random"] = ShardedObject("random", random_states(), (dist.get_world_size(),), (dist.get_rank(),))
    return state


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest first."""
    found = [p for p in root.glob("step-*") if not p.name.endswith(".partial") and (p / INFO).exists()]
    return sorted(found, reverse=True)


def load(
    directory: Path,
    chunks: list[Any],
    *,
    optimizer: Any | None = None,
    schedule: Any | None = None,
    random: bool = False,
    lagged: Sequence[LaggedCopy] = (),
) -> None:
    """Load a checkpoint made at any layout into this one; `random` states only into the one it was made at.

    Collective over all ranks, which share the work of checking its files. Raises CheckpointError on all of them if it is damaged
    or not to be trusted.
    """
    from megatron.core import dist_checkpointing

    info = CheckpointInfo.read(directory)
    verify(info)
    wanted = sharded_state(chunks, optimizer, schedule, random=random, lagged=lagged)
    try:
        # Its check of what all ranks ask for gathers that on every rank, and does not look at pieces of parameters anyway.
        state = dist_checkpointing.load(wanted, str(directory), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # many kinds, for a damaged file
        raise CheckpointError(f"{directory} cannot be loaded: {short(error)}") from error
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"], strict=False)
    if optimizer is not None:
        load_optimizer_state(optimizer, state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
    for copy in lagged:
        copy.load_state(state[copy.name])
    if random:
        set_random_states(state["random"])


def verify(info: CheckpointInfo) -> None:
    """Check owner and checksum of every file, each rank some of them. Collective; raises CheckpointError on all ranks."""
    integrity.check_owner(info.directory, info.files)
    names = sorted(info.files)[dist.get_rank() :: dist.get_world_size()]
    complaints: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, integrity.damage(info.directory, info.files, names))
    found = [text for rank in complaints for text in rank]
    if found:
        raise CheckpointError("; ".join(found) + ".")


def short(error: BaseException) -> str:
    """One line of an error; of a CheckpointException, which carries every rank's traceback, the first rank's cause."""
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    lines = str(error).strip().splitlines() or ["no further detail"]
    return f"{type(error).__name__}: {lines[0]:.300}"


class CheckpointTensors:
    """Reads single, whole model tensors of a checkpoint in one process, without Megatron-Core or a process group."""

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.directory = directory
        self._files = CheckpointInfo.read(directory).files
        self._checked: set[str] = set()
        integrity.check_owner(directory, self._files)
        self._check(".metadata")
        self._reader = FileSystemReader(str(directory))
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # an unreadable pickle raises anything
            raise CheckpointError(f"{directory / '.metadata'} cannot be read: {short(error)}") from None
        self._where: dict[str, set[str]] = {}
        for index, stored in self._metadata.storage_data.items():
            self._where.setdefault(index.fqn, set()).add(stored.relative_path)

    def _check(self, file: str) -> None:
        """Hash a file before its first use."""
        if file not in self._checked:
            if file not in self._files:
                raise CheckpointError(f"{self.directory / file} is not a file that this checkpoint was written with.")
            complaints = integrity.damage(self.directory, self._files, [file])
            if complaints:
                raise CheckpointError(f"{complaints[0]}.")
            self._checked.add(file)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`. Raises CheckpointError if the checkpoint has none or its file is damaged.

        Peak memory: the tensor, and one rank's shard of it where there are several.
        """
        entry = self._metadata.state_dict_metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name}.")
        out = None
        for file in sorted(self._where.get(name, ())):
            self._check(file)
        for chunk in entry.chunks:
            try:
                shard = self._shard(name, chunk.offsets).view(chunk.sizes)
            except (Exception, CheckpointException) as error:
                raise CheckpointError(f"{self.directory}: tensor {name} cannot be read: {short(error)}") from None
            if shard.shape == entry.size:
                return shard
            if out is None:
                out = torch.empty(entry.size, dtype=entry.properties.dtype)
            place = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))
            out[place] = shard
        assert out is not None
        return out

    def _shard(self, name: str, offsets: torch.Size) -> Tensor:
        """One stored shard. `torch.distributed.checkpoint.load` would copy it from a second tensor of its size."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        place = self._metadata.storage_data[MetadataIndex(name, offsets)]
        with open(self.directory / place.relative_path, "rb") as file:
            part: Any = _Part(file, place.offset, place.length)
            return torch.load(part, map_location="cpu", weights_only=True)


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


def hugging_face_reader(directory: Path, architecture: Architecture):
    """A function from Hugging Face tensor name to tensor, and the names in the order that reads each parameter once."""
    tensors = CheckpointTensors(directory)
    owner = {hf: (name, row) for name, row in named_rows(architecture) for hf in row.hf}
    cache: dict[str, list[Tensor]] = {}

    def read(hf: str) -> Tensor:
        name, row = owner[hf]
        if name not in cache:
            cache.clear()
            cache[name] = row.layout.split(tensors.read(name))
        return cache[name][row.hf.index(hf)]

    return read, list(owner)
