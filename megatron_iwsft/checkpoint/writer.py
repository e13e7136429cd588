"""Writing checkpoints: synchronously or in the background, complete or not at all, with a checksum of every file."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_iwsft.checkpoint.info import (
    AdapterInfo,
    CheckpointInfo,
    complete_checkpoints,
    one_line,
    step_name,
    step_of,
    unfinished_checkpoints,
)
from megatron_iwsft.checkpoint.integrity import FileSum, file_sum, names_below
from megatron_iwsft.checkpoint.names import BEST, INFO, LATEST, TOKENIZER
from megatron_iwsft.checkpoint.spread import spread_over_replicas
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.distributed.mcore_compat import (
    async_calls_queue,
    async_save_options,
    save_strategy,
    write_in_this_process,
    write_results,
)
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles
from megatron_iwsft.utils.files import (
    PARTIAL,
    flush_to_disk,
    gibibytes,
    move_aside,
    publish,
    remove_directory,
    write_text,
)

# Free space required beyond the tensors: for the small files, and for others who write there meanwhile.
_SPARE_BYTES = 64 << 20
_PROBE_BYTES = 8 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A completed save: bytes of all its files, seconds that training waited for it, seconds until it was complete."""

    directory: Path
    step: int
    bytes: int
    stall_s: float
    total_s: float


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run under `root`.

    layout         the run's, for iwsft.json
    chat_template  replaces the tokenizer's own, where the corpus was rendered with another one, a date or variables
    corpora, objective, template_hash, adapter  see `CheckpointInfo`
    keep           how many of the newest are kept; None keeps all
    keep_every     steps that are a multiple of it are kept as well
    best_steps     steps that are kept as well, the best one first; `best` names them
    asynchronous   tensors are copied, a forked process writes and hashes them, and the checkpoint counts once `poll` or `wait`
                   has found every rank's files written
    on_saved       called on every rank with each completed save

    Every method is collective over all ranks, and raises CheckpointError on all of them if a save has failed; earlier checkpoints
    are then unchanged, and saving can be retried.
    """

    root: Path
    architecture: Architecture
    config: dict[str, Any] = field(default_factory=dict)
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    tokenizer_files: list[Path] = field(default_factory=list)
    template_hash: str | None = None
    chat_template: str | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    objective: str | None = None
    adapter: AdapterInfo | None = None
    keep: int | None = None
    keep_every: int = 0
    best_steps: Callable[[], list[int]] | None = None
    asynchronous: bool = False
    on_saved: Callable[[Saved], None] | None = None
    _queue: Any = field(default=None, init=False)
    _swept: bool = field(default=False, init=False)
    _partial: Path | None = field(default=None, init=False)
    _strategy: Any = field(default=None, init=False)
    _structure: str = field(default="", init=False)

    def supporting_files(self, step: int) -> SupportingFiles:
        """The files that go with the weights of `step` when they are exported."""
        provenance = Provenance(step, self.config, self.corpora, self.template_hash)
        return SupportingFiles(self.tokenizer_files, provenance, self.chat_template)

    def save(self, state: TrainState) -> Path:
        """Write root/step-…, then update `latest` and remove checkpoints that need not be kept."""
        from megatron.core import dist_checkpointing

        self.wait()
        write_results().clear()
        started = time.perf_counter()
        state.gather_parameters()
        final = self.root / step_name(state.step)
        sharded = state.sharded(random=state.optimizer is not None)
        spread_over_replicas(sharded, self.layout)
        directory = self._prepare(final, self._plan(sharded))
        pending = _Pending(directory, final, state.step, state.host_states(), started)
        request = dist_checkpointing.save(
            sharded,
            str(directory),
            self._strategy,
            validate_access_integrity=False,
            **async_save_options(),
        )
        request.add_finalize_fn(lambda: self._complete(pending))
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write_and_hash, request.async_fn, directory, dist.get_rank()))
        self._partial = directory
        # A synchronous save is written by a forked process, too: if a full disk kills the writer, training survives.
        with self._as_checkpoint_error(final):
            self._calls().schedule_async_request(request)
            if self.asynchronous:
                pending.stall_s = time.perf_counter() - started
            else:
                self._calls().maybe_finalize_async_calls(blocking=True)
        return final

    def poll(self) -> None:
        """Complete a background save if its files are written."""
        if self._queue is not None:
            with self._as_checkpoint_error(self.root):
                self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait for a background save and complete it, if there is one."""
        if self._queue is not None:
            with self._as_checkpoint_error(self.root):
                self._queue.maybe_finalize_async_calls(blocking=True)

    def discard_after(self, step: int) -> None:
        """Remove checkpoints of later steps, which rolling back to `step` has made obsolete."""

        def discard() -> None:
            left = complete_checkpoints(self.root)
            self._point_at(next(c for c in left if c.name == step_name(step)))
            self._point_at_best()
            for later in left:
                if later.name > step_name(step):
                    remove_directory(later)

        _written(self.root, discard)

    @contextmanager
    def _as_checkpoint_error(self, what: Path) -> Iterator[None]:
        """Turn Megatron-Core's exception for a failed write, raised on all ranks, into a CheckpointError; keep nothing of that save."""
        try:
            yield
        except (CheckpointException, CheckpointError) as error:
            if self._partial is not None and dist.get_rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None
            if isinstance(error, CheckpointError):
                raise
            reason = one_line(error)
            if "Cannot allocate memory" in reason:
                reason += "; a rank has reached its memory limit, or the machine has no memory left."
            elif "Worker failure" in reason:  # torch.save and 0.19 leave out the system's error
                reason += "; usually the disk is full, or a quota or a limit on file sizes is reached."
            raise CheckpointError(
                f"{what} could not be written: {reason}. Check the disk's space and permissions."
            ) from None

    def point_at_best(self) -> None:
        """Write `best` anew, after the best steps have changed without a save."""
        _written(self.root, self._point_at_best)

    def _point_at(self, final: Path) -> None:
        self._write_names(LATEST, [final.name])

    def _point_at_best(self) -> None:
        if self.best_steps is not None and self.best_steps():
            self._write_names(BEST, [step_name(step) for step in self.best_steps()])
        elif self.best_steps is not None and (self.root / BEST).is_file():
            (self.root / BEST).unlink()

    def _write_names(self, file: str, names: list[str]) -> None:
        path = self.root / file
        if path.is_dir() and not path.is_symlink():  # nothing else can be in the way of a rename
            move_aside(path)
        write_text(path, "".join(f"{name}\n" for name in names))

    def _calls(self) -> Any:
        if self._queue is None:
            self._queue = async_calls_queue()
        return self._queue

    def _plan(self, sharded: dict[str, Any]) -> int:
        """Bytes that all ranks together will write, and a new strategy if the state's structure changed. Collective: a sum."""
        structure, own = _structure(sharded)
        changed = structure != self._structure
        sums = torch.tensor([own, changed], dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(sums)
        needed, ranks_changed = sums.tolist()
        if ranks_changed:
            self._strategy = save_strategy()
        self._structure = structure
        return needed

    def _prepare(self, final: Path, needed: int) -> Path:
        """Create an empty directory to write into. Raises CheckpointError if there is not enough space."""

        def prepare() -> str:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._swept:  # what a killed run has left
                for left in unfinished_checkpoints(self.root):
                    shutil.rmtree(left, ignore_errors=True)
                self._swept = True
            self._check_space(needed)
            # A unique name: a writer that has outlived a killed run may still be writing into that run's directory.
            directory = self.root / f"{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
            directory.mkdir()
            try:
                _probe(directory / "probe")
            except OSError:
                shutil.rmtree(directory, ignore_errors=True)
                raise
            return directory.name

        return self.root / _written(final, prepare)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free >= needed + _SPARE_BYTES:
            return
        others = complete_checkpoints(self.root)
        raise CheckpointError(
            f"the next checkpoint needs {gibibytes(needed + _SPARE_BYTES)}, but {self.root} has only {gibibytes(free)} free. Free at least "
            f"{gibibytes(needed + _SPARE_BYTES - free)} there. Complete checkpoints: {', '.join(c.name for c in others) or 'none'}."
        )

    def _complete(self, pending: _Pending) -> None:
        """Gather the ranks' checksums, write iwsft.json, and rename the checkpoint."""
        sums: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(_take_sums(pending.partial, dist.get_rank()), sums)
        size = _written(pending.final, lambda: self._publish(pending, sums or []))
        self._partial = None
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
            (directory / TOKENIZER / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        files = {name: entry for rank in sums for name, entry in rank.items()}
        for name in names_below(directory):
            if name in files:  # its rank has looked at it
                continue
            path = directory / name
            if path.suffix == ".distcp":
                raise CheckpointError(
                    f"no rank reported a checksum of {path}: its writer did not finish. "
                    "Check the logs of the ranks for the first error."
                )
            _take_write_permissions(path)
            if path.is_file():
                files[name] = file_sum(path)
        info = CheckpointInfo(
            directory,
            step=pending.step,
            architecture=self.architecture,
            config=self.config,
            layout=self.layout,
            template_hash=self.template_hash,
            corpora=self.corpora,
            objective=self.objective,
            host=pending.host,
            files=files,
            adapter=self.adapter,
        )
        write_text(directory / INFO, info.to_text())
        _take_write_permissions(directory / INFO)
        if final.exists():
            remove_directory(final)
        publish(directory, final)
        self._point_at(final)
        self._point_at_best()
        best = self.best_steps() if self.best_steps is not None else []
        others = [c for c in complete_checkpoints(self.root) if c != final]
        for old in others[self.keep - 1 :] if self.keep else []:
            if step_of(old) not in best and (not self.keep_every or step_of(old) % self.keep_every):
                remove_directory(old)
        return sum(file["bytes"] for file in files.values())


@dataclass
class _Pending:
    """A save in progress. stall_s stays 0 if training waits for it."""

    partial: Path
    final: Path
    step: int
    host: dict[str, Any]
    started: float
    stall_s: float = 0.0


def _write_and_hash(write: Callable[..., None], directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """In the writing process: Megatron-Core's writer, then the checksums of this rank's files for `_take_sums`."""
    write_in_this_process()
    try:
        write(*args, **kwargs)
    except Exception as error:  # without a result the cause would be lost
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        write_results().put(RuntimeError(f"{error}{' in /dev/shm' if full else ''}"))
        return
    try:
        sums = {}
        for path in _files_of(directory, rank):
            _take_write_permissions(path)
            sums[path.name] = file_sum(path)
        (directory / _sums_name(rank)).write_text(json.dumps(sums), encoding="utf-8")
    except OSError:
        pass  # the first rank finds no checksums and reports it


def _files_of(directory: Path, rank: int) -> Iterator[Path]:
    """The files that Megatron-Core's writer has made for a rank, which it numbers. Does not list the directory, which holds all ranks'."""
    return itertools.takewhile(Path.exists, (directory / f"__{rank}_{k}.distcp" for k in itertools.count()))


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


def _written(what: Path, function: Callable[[], T]) -> T:
    """`on_first_rank`, with CheckpointError for an OSError."""
    try:
        return on_first_rank(function)
    except OSError as error:
        raise CheckpointError(
            f"{what} could not be written: {error.strerror} ({error.filename or what.parent}). "
            "Check the disk's space and permissions."
        ) from None


def _structure(state: dict[str, Any]) -> tuple[str, int]:
    """A hash of what this rank will write, apart from values; and how many bytes of tensors that is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica

    written = [v for v in nested_values(state) if isinstance(v, ShardedBase) and is_main_replica(v.replica_id)]
    tensors = [v for v in written if isinstance(v, ShardedTensor)]
    entries = [(v.key, v.global_offset, v.global_shape, getattr(v, "local_shape", None)) for v in written]
    dtypes = [str(v.dtype) for v in tensors]
    return hashlib.sha256(repr((entries, dtypes)).encode()).hexdigest(), sum(v.data.nbytes for v in tensors)


def _take_write_permissions(path: Path) -> None:
    """From group and others, whatever the umask: a checkpoint that others can write is refused when it is loaded."""
    path.chmod(path.stat().st_mode & ~0o022)


def _probe(path: Path) -> None:
    """Write some bytes: quotas, read-only mounts and missing inodes do not show in the free space."""
    path.write_bytes(bytes(_PROBE_BYTES))
    flush_to_disk(path)
    path.unlink()
