"""`run.profile`: a torch profiler trace of some steps, a memory snapshot on CUDA, and a table of where their time went.

Ranges are marked in every step, profiled or not: an unused one costs about a microsecond. With nsys:
`nsys profile --capture-range cudaProfilerApi --trace cuda,nvtx …` records the same steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megatron_iwsft.config.schema import Profile
from megatron_iwsft.utils.files import atomic_write, publish, write_text

_PREFIX = "iwsft: "
# Row of the table → (its events' names, or what they begin with; whether the row is part of the one above it). Matmuls and attention are
# those of torch's own operators: Transformer Engine's have other names.
_ROWS: dict[str, tuple[tuple[str, ...], bool]] = {
    "data": ((f"{_PREFIX}data",), False),
    "forward and backward": ((f"{_PREFIX}forward and backward",), False),
    "forward": ((f"{_PREFIX}forward",), True),
    "loss operator, forward": (("_VocabParallelLogprob",), True),
    "loss operator, backward": (("_VocabParallelLogprobBackward",), True),
    "objective": ((f"{_PREFIX}objective",), True),
    "optimizer": ((f"{_PREFIX}optimizer",), False),
    "evaluation, saving, callbacks": ((f"{_PREFIX}callbacks",), False),
    "matmuls, in all of these": (("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"), False),
    "attention, in all of these": (("aten::_scaled_dot_product*", "torch_attn::*"), False),
    "communication, in all of these": (("gloo:*", "nccl:*"), False),
}
_MEMORY_EVENTS = 1_000_000


@contextmanager
def range_of(name: str) -> Iterator[None]:
    """A range in profiler traces, and with CUDA for nsys."""
    with torch.profiler.record_function(f"{_PREFIX}{name}"):
        if torch.cuda.is_initialized():
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Profiles steps first … last of `settings` on this rank, if it is one of its ranks, and writes to `directory`.

    A run that is resumed within these steps profiles the rest of them.
    """

    def __init__(self, settings: Profile, rank: int, directory: Path, *, is_cuda: bool) -> None:
        self._steps = settings.steps if rank in settings.ranks else None
        self._rank, self._directory, self._is_cuda = rank, directory, is_cuda
        self._profile: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            torch.cuda.profiler.start()
        self._first = step
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.__enter__()

    def after(self, step: int) -> str | None:
        """The table, for people, after the last profiled step; its callbacks included."""
        if self._profile is None or self._steps is None or step < self._steps[1]:
            return None
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        what = f"profiled steps {self._first} to {step} on rank {self._rank}"
        try:
            return f"{what}: {self._write(profile, step)}"
        except (OSError, RuntimeError) as error:  # a full disk must not end the run; torch raises either
            return f"{what}, but the profile could not be written to {self._directory}: {error}. Training continues."

    def _write(self, profile: Any, step: int) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank}-steps-{self._first}-{step}"
        trace = self._directory / f"{name}.json.gz"
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=f".{name}.") as partial:
            profile.export_chrome_trace(f"{partial}/{trace.name}")  # which would follow a link
            publish(Path(partial) / trace.name, trace)
        if self._is_cuda:
            torch.cuda.profiler.stop()
            with atomic_write(self._directory / f"{name}.memory.pickle", "wb") as file:
                file.write(_memory_snapshot())
        table = _table(profile.key_averages(), steps=step - self._first + 1, on_device=self._is_cuda)
        write_text(self._directory / f"{name}.txt", table + "\n")
        return f"{trace} (open it at ui.perfetto.dev)\n{table}"

    def close(self) -> None:
        """When the run ends before the last profiled step: nothing is written."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None


def _memory_snapshot() -> bytes:
    """For https://docs.pytorch.org/memory_viz."""
    import pickle

    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    return pickle.dumps(snapshot)


def _table(averages: Any, *, steps: int, on_device: bool) -> str:
    """Milliseconds per step of each row: of the host, and of the kernels that it started."""
    columns = ("host ms", "device ms") if on_device else ("ms",)
    lines = [f"{'per step':34}" + "".join(f"{column:>12}" for column in columns)]
    for row, (patterns, part) in _ROWS.items():
        found = [event for event in averages if _matches(event.key, patterns)]
        if found:
            times = [sum(event.cpu_time_total for event in found)]
            if on_device:
                times.append(sum(event.device_time_total for event in found))
            label = f"  {row}" if part else row
            lines.append(f"{label:34}" + "".join(f"{time / 1e3 / steps:12.2f}" for time in times))
    return "\n".join(lines)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
