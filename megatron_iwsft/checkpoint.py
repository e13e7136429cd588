"""Checkpoints: Megatron-Core's `dist_checkpointing` (torch_dist) in directories that are whole or not there.

    checkpoints/
        latest                 name of the newest complete checkpoint, replaced atomically
        step-00000100/
            iwsft.json         step, architecture, layout, resolved config; its presence means complete
            tokenizer/         so that an export needs nothing else
            .metadata, *.distcp, common.pt, metadata.json

A checkpoint is written under `step-….partial` and renamed when every rank is done.

`.metadata` and `common.pt` are pickles, by Megatron-Core's and torch's format: load only checkpoints that you trust.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.model.architecture import Architecture
from megatron_iwsft.model.card import Companions, Provenance
from megatron_iwsft.model.weights import named_rows
from megatron_iwsft.platform import async_save_options

INFO = "iwsft.json"
LATEST = "latest"
TOKENIZER = "tokenizer"
FORMAT_VERSION = 1

# How Megatron-Core lays states out: one key a layer (so that any pipeline split and the exporter find it), optimizer states in
# the shape of their parameters (so that they load at any layout).
_LAYOUT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What `iwsft.json` says."""

    directory: Path
    step: int
    architecture: Architecture
    config: dict[str, Any]
    layout: dict[str, int]
    template_hash: str | None
    corpus: str | None

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
            return CheckpointInfo(
                directory=directory,
                step=info["step"],
                architecture=Architecture.from_hf(info["architecture"], where=str(path)),
                config=info["config"],
                layout=info["layout"],
                template_hash=info.get("template_hash"),
                corpus=info.get("corpus"),
            )
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path} is damaged.") from None


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _state(chunks: list[Any], optimizer: Any | None, schedule: Any | None, *, loading: bool) -> dict[str, Any]:
    metadata = dict(_LAYOUT)
    state: dict[str, Any] = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        if loading:
            _create_optimizer_states(optimizer)
        # Chunks of an interleaved pipeline number their layers alike: the optimizer wants tensors, whatever their keys.
        models = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
        state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    if schedule is not None:
        state["schedule"] = schedule.state_dict()
    return state


def _create_optimizer_states(optimizer: Any) -> None:
    """Give torch's AdamW its states, which it makes at its first step, so that there is something to load into.

    Whatever this step changes is overwritten by the load.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Optimizer) and not part.optimizer.state:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            part.optimizer.step()
            part.optimizer.zero_grad()


def _load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict`, but for the distributed optimizer over torch's AdamW.

    Megatron-Core keeps AdamW's step count in the parameter groups, then, loading parameter states, expects it among those too
    and fails (0.16 and 0.19 alike). So the two halves are loaded one after the other, with the counts out of the way.
    """
    parts = optimizer.chained_optimizers
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for part, own in zip(parts, states, strict=True):
        if not isinstance(part.optimizer, torch.optim.Optimizer) or "param_state" not in own:
            part.load_state_dict(own)
            continue
        parameter_state = own.pop("param_state")
        part.load_state_dict(own)
        states = part.optimizer.state.items()
        steps = {parameter: values.pop("step") for parameter, values in states if "step" in values}
        part.load_parameter_state_from_fully_reshardable(parameter_state)
        for parameter, step in steps.items():
            # A count of its own: Megatron-Core hands all of them one tensor, which each update would then advance.
            part.optimizer.state[parameter]["step"] = step.clone()


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run under `root`, at once or in the background.

    corpus: fingerprint of what was trained on.
    chat_template: replaces the tokenizer's own, where the corpus was rendered with a named one.
    asynchronous: tensors are copied, a forked process writes them, and the checkpoint counts once `poll` or `wait` has found
    every rank's file written. Every method is collective over all ranks.
    """

    root: Path
    architecture: Architecture
    config: dict[str, Any]
    layout: dict[str, int]
    tokenizer_files: list[Path]
    template_hash: str | None = None
    corpus: str | None = None
    chat_template: str | None = None
    keep: int | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._queue = AsyncCallsQueue()

    def companions(self, step: int) -> Companions:
        """What goes with the weights of `step` when they are exported."""
        provenance = Provenance(step, self.config, self.corpus, self.template_hash)
        return Companions(self.tokenizer_files, provenance, self.chat_template)

    def save(self, step: int, chunks: list[Any], *, optimizer: Any | None = None, schedule: Any | None = None) -> Path:
        """Write root/step-…, then point `latest` at it and remove all but the `keep` newest."""
        from megatron.core import dist_checkpointing

        self.wait()
        final = self.root / step_name(step)
        partial = self.root / f"{final.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = _state(chunks, optimizer, schedule, loading=False)
        options = async_save_options() if self.asynchronous else {}
        request = dist_checkpointing.save(state, str(partial), validate_access_integrity=False, **options)
        if request is None:
            self._complete(partial, final, step)
        else:
            request.add_finalize_fn(lambda: self._complete(partial, final, step))
            self._queue.schedule_async_request(request)
        return final

    def poll(self) -> None:
        """Complete a background save whose files are written, if there is one."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait for a background save and complete it, if there is one."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def _complete(self, partial: Path, final: Path, step: int) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            (partial / TOKENIZER).mkdir()
            for file in self.tokenizer_files:
                shutil.copyfile(file, partial / TOKENIZER / file.name)
            if self.chat_template is not None:
                (partial / TOKENIZER / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            info = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "architecture": self.architecture.hf,
                "layout": self.layout,
                "config": self.config,
                "template_hash": self.template_hash,
                "corpus": self.corpus,
            }
            (partial / INFO).write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            pointer = self.root / f"{LATEST}.partial"
            pointer.write_text(final.name + "\n")
            os.replace(pointer, self.root / LATEST)
            others = [c for c in complete_checkpoints(self.root) if c != final]
            for old in others[self.keep - 1 :] if self.keep else []:
                shutil.rmtree(old)
        dist.barrier()


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest first."""
    found = [p for p in root.glob("step-*") if not p.name.endswith(".partial") and (p / INFO).exists()]
    return sorted(found, reverse=True)


def load(directory: Path, chunks: list[Any], *, optimizer: Any | None = None, schedule: Any | None = None) -> None:
    """Load a checkpoint made at any layout into this one. Collective over all ranks. Raises CheckpointError if it is damaged."""
    from megatron.core import dist_checkpointing

    wanted = _state(chunks, optimizer, schedule, loading=True)
    try:
        state = dist_checkpointing.load(wanted, str(directory))
    except (Exception, CheckpointException) as error:  # many kinds, for a damaged file
        raise CheckpointError(f"{directory} cannot be loaded: {_short(error)}") from error
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"], strict=False)
    if optimizer is not None:
        _load_optimizer(optimizer, state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])


def _short(error: BaseException) -> str:
    """One line of an error; of a CheckpointException, which carries every rank's traceback, the first rank's cause."""
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no further detail'}"
    )


class CheckpointTensors:
    """Reads single, whole model tensors of a checkpoint in one process, without Megatron-Core or a process group."""

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.directory = directory
        self._reader = FileSystemReader(str(directory))
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # an unreadable pickle raises anything
            raise CheckpointError(f"{directory / '.metadata'} cannot be read: {_short(error)}") from None

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`. Raises CheckpointError if the checkpoint has none or its file is damaged.

        Peak memory: the tensor, and one rank's shard of it where there are several.
        """
        entry = self._metadata.state_dict_metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory} holds no tensor {name}.")
        out = None
        for chunk in entry.chunks:
            try:
                shard = self._shard(name, chunk.offsets).view(chunk.sizes)
            except (Exception, CheckpointException) as error:
                raise CheckpointError(f"{self.directory}: tensor {name} cannot be read: {_short(error)}") from None
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
