"""What people watch: a line every few steps, or a live table where the output is a terminal."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from megatron_iwsft.config.schema import Logging
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.text import printable_line, tell


class Pace:
    """Means over the steps since `reset`, which single steps are too uneven for, and the time that is left."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._done = 0
        self.reset()

    def reset(self) -> None:
        self._seconds = self._tokens = self._work = 0.0

    def add(self, result: StepResult) -> None:
        m = result.metrics
        if result.step == 0:  # evaluated before the first step
            return
        if self._begun is None:  # the first step compiles and allocates: the estimate begins after it
            self._begun = time.monotonic()
        else:
            self._done += 1
        if "step_time_s" in m and "tokens" in m:
            self._seconds += m["step_time_s"]
            self._tokens += m["tokens"]
            self._work += m["tflops_per_gpu"] * m["step_time_s"]

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def tflops_per_gpu(self) -> float:
        return self._work / self._seconds if self._seconds else 0.0

    def seconds_left(self, result: StepResult) -> float | None:
        """From all steps of this process so far, with evaluation and saving; None before the second step."""
        if self._begun is None or not self._done:
            return None
        return (time.monotonic() - self._begun) / self._done * (result.total_steps - result.step)


def console(
    settings: Logging, *, platform: Platform, peak_tflops: float | None, at_exit: ExitStack
) -> Callable[[StepResult], None]:
    """Called after every step; prints every `logging.every`-th, or keeps a live table. `peak_tflops`: of one GPU, if known."""
    live = settings.console == "live" or (settings.console == "auto" and _is_terminal())
    table = _LiveTable(at_exit) if live else None
    pace = Pace()

    def show(result: StepResult) -> None:
        pace.add(result)
        if table is None and result.step % settings.every and not result.is_last:
            return
        values = _values(result, pace, platform, peak_tflops)
        pace.reset()
        if table is None:
            tell(" | ".join(f"{name} {value}" for name, value in values.items()))
        else:
            table.show(result, values)

    return show


def _is_terminal() -> bool:
    """Whether a table can be redrawn: not in a batch job's log, a pipe, or a terminal without cursor movement."""
    if sys.stdout is None or not sys.stdout.isatty():  # None: closed when the process started
        return False
    return os.environ.get("TERM", "dumb") != "dumb" and "SLURM_JOB_ID" not in os.environ


def _values(result: StepResult, pace: Pace, platform: Platform, peak_tflops: float | None) -> dict[str, str]:
    """Name → text, in the order in which they are shown."""
    each = "GPU" if platform.is_cuda else "process"
    m = result.metrics
    out = {"step": f"{result.step}/{result.total_steps}"}
    if result.step == 0:
        return out | _evaluated(m)
    if m.get("loss") is None:
        return out | {"passed over:": m["skipped"]} | _evaluated(m)
    out |= {"loss": f"{m['loss']:.4f}", "nll": f"{m['nll']:.4f}"}
    if "weighted_log_ratio" in m:
        out["w"] = f"{m['weight_mean']:.3f} (max {m['weight_max']:.2f}, ess {m['weight_ess']:.2f})"
    out |= {"grad": f"{m['grad_norm']:.3f}", "lr": f"{m['lr']:.2e}"}
    out |= _evaluated(m)
    out[f"tokens/s/{each}"] = f"{pace.tokens_per_s / platform.world_size:,.0f}"
    out[f"TFLOP/s/{each}"] = f"{pace.tflops_per_gpu:.3g}"
    if peak_tflops:
        out["MFU"] = f"{pace.tflops_per_gpu / peak_tflops:.1%}"
    out["memory"] = f"{m['peak_memory_bytes'] / 1e9:.1f} GB"
    left = pace.seconds_left(result)
    if left is not None and not result.is_last:
        out["left"] = duration(left)
    if "skipped" in m:
        out["skipped:"] = m["skipped"]
    return out


def _evaluated(metrics: dict[str, Any]) -> dict[str, str]:
    """The nll of each evaluation set and pass@k of each benchmark, where they were evaluated."""
    out = {}
    for name, value in metrics.items():
        if found := re.fullmatch(r"eval/(.*)/(nll|pass@\d+)", name):
            out[f"{found[1]} {found[2]}"] = f"{value:.4f}" if found[2] == "nll" else f"{value:.1%}"
    return out


def duration(seconds: float) -> str:
    """12 s, 3:05 min, 2:07 h or 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


class _LiveTable:
    """Redraws one table below whatever else is printed. It has no thread: it is redrawn when a step ends."""

    def __init__(self, at_exit: ExitStack) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, vertical_overflow="visible")
        self._live.start()
        self._live.console.show_cursor(True)  # a job can end without a chance to show it again
        at_exit.callback(self._stop)

    def show(self, result: StepResult, values: Mapping[str, str]) -> None:
        with suppress(OSError):  # the terminal has gone; the run has not
            self._live.update(live_table(result, values), refresh=True)

    def _stop(self) -> None:
        with suppress(OSError):
            self._live.stop()


def live_table(result: StepResult, values: Mapping[str, str]) -> Any:
    """The table, as something that rich can draw: a bar, then names over values, four in a row."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    cells = [
        Text.assemble((printable_line(name), "dim"), "\n", printable_line(value)) for name, value in values.items()
    ]
    grid = Table.grid(padding=(0, 3), expand=True)
    for _ in range(4):
        grid.add_column()
    for start in range(0, len(cells), 4):
        grid.add_row(*cells[start : start + 4])
    whole = Table.grid(expand=True)
    whole.add_row(ProgressBar(total=result.total_steps, completed=result.step, complete_style="green"))
    whole.add_row(grid)
    return Panel(whole, title=Text(printable_line(result.config.run.name)), width=100)
