"""Writing checkpoints: at once or in the background, whole or not at all, with a checksum of every file."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_iwsft.checkpoint import info as checkpoint
from megatron_iwsft.checkpoint.info import INFO, LATEST, TOKENIZER, complete_checkpoints, step_name
from megatron_iwsft.checkpoint.integrity import FileSum, file_sum
from megatron_iwsft.distributed.context import async_save_options, start_results_queue
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles
from megatron_iwsft.reference.lagged_copy import LaggedCopy

PARTIAL = ".partial"
# Beyond what the tensors need: the small files, and room for whoever else writes there meanwhile.
_SPARE_BYTES = 64 << 20
_PROBE_BYTES = 8 << 20


@dataclass(frozen=True)
class Saved:
    """A save that is complete: bytes of its files, seconds that training stood still for it, seconds until it was whole."""

    directory: Path
    step: int
    bytes: int
    stall_s: float
    total_s: float


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run under `root`.

    chat_template: replaces the tokenizer's own, where the corpus was rendered with a named one.
    keep: how many of the newest stay, None keeps all; keep_every: a step that is a multiple of it stays whatever `keep` says.
    asynchronous: tensors are copied, a forked process writes and hashes them, and the checkpoint counts once `poll` or `wait`
    has found every rank's files written.
    on_saved: called on every rank with each complete save.

    Every method is collective over all ranks, and raises CheckpointError on all of them if a save has failed; what was there
    before is then as it was, and another save may be tried.
    """

    root: Path
    architecture: Architecture
    config: dict[str, Any]
    layout: dict[str, Any]
    tokenizer_files: list[Path]
    template_hash: str | None = None
    chat_template: str | None = None
    corpus: str | None = None
    keep: int | None = None
    keep_every: int = 0
    asynchronous: bool = False
    on_saved: Callable[[Saved], None] | None = None
    _queue: Any = field(default=None, init=False)
    _swept: bool = field(default=False, init=False)

    def supporting_files(self, step: int) -> SupportingFiles:
        """What goes with the weights of `step` when they are exported."""
        provenance = Provenance(step, self.config, self.corpus, self.template_hash)
        return SupportingFiles(self.tokenizer_files, provenance, self.chat_template)

    def save(
        self,
        step: int,
        chunks: list[Any],
        *,
        optimizer: Any | None = None,
        schedule: Any | None = None,
        trainer: dict[str, Any] | None = None,
        lagged: Sequence[LaggedCopy] = (),
    ) -> Path:
        """Write root/step-…, then point `latest` at it and remove what need not be kept. trainer: JSON values."""
        from megatron.core import dist_checkpointing

        self.wait()
        start_results_queue()
        started = time.perf_counter()
        final = self.root / step_name(step)
        state = checkpoint.sharded_state(
            chunks,
            optimizer,
            schedule,
            random=optimizer is not None,
            lagged=lagged,
        )
        partial_directory = self._prepare(final, _bytes_to_write(state))
        pending = _Pending(partial_directory, final, step, trainer or {}, started)
        request = dist_checkpointing.save(
            state, str(partial_directory), validate_access_integrity=False, **async_save_options()
        )
        request.add_finalize_fn(lambda: self._complete(pending))
        if request.async_fn is not None:
            request = request._replace(
                async_fn=partial(_write_and_hash, request.async_fn, partial_directory, dist.get_rank())
            )
        # In a forked process also where training waits for it: a writer that a full disk brings down takes no trainer along.
        with _as_checkpoint_error(final):
            self._calls().schedule_async_request(request)
            if self.asynchronous:
                pending.stall_s = time.perf_counter() - started
            else:
                self._calls().maybe_finalize_async_calls(blocking=True)
        return final

    def poll(self) -> None:
        """Complete a background save whose files are written, if there is one."""
        if self._queue is not None:
            with _as_checkpoint_error(self.root):
                self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait for a background save and complete it, if there is one."""
        if self._queue is not None:
            with _as_checkpoint_error(self.root):
                self._queue.maybe_finalize_async_calls(blocking=True)

    def discard_after(self, step: int) -> None:
        """Remove this run's checkpoints of later steps than `step`, which a rewind has made obsolete."""

        def discard() -> None:
            left = complete_checkpoints(self.root)
            self._point_at(next(c for c in left if c.name == step_name(step)))
            for later in left:
                if later.name > step_name(step):
                    _remove(later)

        _on_first_rank(discard, self.root)

    def _point_at(self, final: Path) -> None:
        pointer = self.root / f"{LATEST}{PARTIAL}"
        _write_durably(pointer, final.name + "\n")
        os.replace(pointer, self.root / LATEST)

    def _calls(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()
        return self._queue

    def _prepare(self, final: Path, needed: int) -> Path:
        """An empty directory to write into, where there is room."""

        def prepare() -> str:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._swept:  # what a killed run left behind
                for left in self.root.glob(f"step-*{PARTIAL}"):
                    shutil.rmtree(left, ignore_errors=True)
                self._swept = True
            self._check_space(needed)
            # A name of its own: a writer that outlived a killed run may still be writing into that run's.
            directory = self.root / f"{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
            directory.mkdir()
            _probe(directory / "probe")
            return directory.name

        return self.root / _on_first_rank(prepare, final)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free >= needed + _SPARE_BYTES:
            return
        others = complete_checkpoints(self.root)
        raise CheckpointError(
            f"the next checkpoint needs {_gib(needed + _SPARE_BYTES)}, but {self.root} has {_gib(free)} free. Free "
            f"{_gib(needed + _SPARE_BYTES - free)} there; its {len(others)} complete checkpoints are "
            f"{', '.join(c.name for c in others) or 'none'}."
        )

    def _complete(self, pending: _Pending) -> None:
        """Gather the ranks' checksums, write the info file, and give the checkpoint its name."""
        sums: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(_take_sums(pending.partial, dist.get_rank()), sums)
        size = _on_first_rank(lambda: self._publish(pending, sums or []), pending.final)
        total = time.perf_counter() - pending.started
        if self.on_saved is not None:
            self.on_saved(Saved(pending.final, pending.step, size, pending.stall_s or total, total))

    def _publish(self, pending: _Pending, sums: list[dict[str, FileSum]]) -> int:
        """On the first rank; returns the bytes of all files."""
        directory, final = pending.partial, pending.final
        (directory / TOKENIZER).mkdir()
        for file in self.tokenizer_files:
            shutil.copyfile(file, directory / TOKENIZER / file.name)
        if self.chat_template is not None:
            (directory / TOKENIZER / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        files = {name: entry for rank in sums for name, entry in rank.items()}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            name = path.relative_to(directory).as_posix()
            if name not in files:
                if path.suffix == ".distcp":
                    raise CheckpointError(f"no rank says that it has written {path} whole.")
                files[name] = file_sum(path)
        info = {
            "format_version": checkpoint.FORMAT_VERSION,
            "step": pending.step,
            "architecture": self.architecture.hf,
            "layout": self.layout,
            "config": self.config,
            "template_hash": self.template_hash,
            "corpus": self.corpus,
            "trainer": pending.trainer,
            "files": files,
        }
        info = json.loads(json.dumps(info))  # as it will be read: the checksum is of that
        text = json.dumps(info | {"checksum": checkpoint.info_checksum(info)}, indent=1, ensure_ascii=False)
        _write_durably(directory / INFO, text + "\n")
        if final.exists():
            _remove(final)
        os.replace(directory, final)
        self._point_at(final)
        others = [c for c in complete_checkpoints(self.root) if c != final]
        for old in others[self.keep - 1 :] if self.keep else []:
            if not self.keep_every or int(old.name.removeprefix("step-")) % self.keep_every:
                _remove(old)
        return sum(file["bytes"] for file in files.values())


@dataclass
class _Pending:
    """A save under way. stall_s stays 0 for one that training waits for."""

    partial: Path
    final: Path
    step: int
    trainer: dict[str, Any]
    started: float
    stall_s: float = 0.0


def _write_and_hash(write: Callable[..., None], directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """In the writing process: Megatron-Core's writer, then the checksums of this rank's files for `_take_sums`."""
    write(*args, **kwargs)
    try:
        sums = {path.name: file_sum(path) for path in directory.glob(f"__{rank}_*.distcp")}
        (directory / _sums_name(rank)).write_text(json.dumps(sums), encoding="utf-8")
    except OSError:
        pass  # the first rank misses the checksums and says so


def _take_sums(directory: Path, rank: int) -> dict[str, FileSum]:
    path = directory / _sums_name(rank)
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    except (OSError, ValueError):
        return {}
    return sums


def _sums_name(rank: int) -> str:
    return f"checksums-{rank}.json"


class _as_checkpoint_error:
    """Turn Megatron-Core's exception for a failed write, raised on all ranks, into a CheckpointError."""

    def __init__(self, what: Path) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CheckpointException):
            reason = checkpoint.short(error)
            if "Worker failure" in reason:  # torch.save and 0.19 leave out what the system said
                reason += "; most often the disk is full, or there is a quota or a limit on file sizes."
            raise CheckpointError(f"{self.what} could not be written: {reason}") from None


def _on_first_rank(function: Callable[[], Any], what: Path) -> Any:
    """The answer of `function`, run on the first rank alone; its failure is raised on all. Collective: a broadcast."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except CheckpointError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"{what} could not be written: {error.strerror} ({error.filename or what.parent})."
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return answer[0]


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that all ranks together will write. Collective: a sum."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    own = sum(
        value.data.nbytes
        for value in nested_values(state)
        if isinstance(getattr(value, "data", None), torch.Tensor) and is_main_replica(getattr(value, "replica_id", 0))
    )
    total = torch.tensor(own, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total)


def _probe(path: Path) -> None:
    """Write some bytes for real: quotas, read-only mounts and a lack of inodes do not show in the free space."""
    with open(path, "wb") as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(directory: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of it is ever taken for a whole."""
    doomed = directory.with_name(f"{directory.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
