"""metrics.jsonl: one line per step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.jsonl import JsonLines, read_json_lines
from megatron_iwsft.utils.text import tell

METRICS_FILE = "metrics.jsonl"


def read_metrics_file(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Its lines up to the first damaged one, and a sentence about that one, if any. Raises OSError."""
    return read_json_lines(path, valid=_is_of_a_step)


class MetricsFile:
    """Appends each step's metrics, after removing what an interrupted run wrote beyond step `resumed_at`.

    When a step is repeated after a rewind, what was written since its first time is removed. `say` gets a sentence if the file had to
    be repaired. If the disk is full, lines are kept in memory and written later.
    """

    def __init__(self, path: Path, resumed_at: int, say: Callable[[str], None] = tell) -> None:
        self._file, self._last, self._failing = JsonLines(path, say, valid=_is_of_a_step), resumed_at, False
        self._cut(resumed_at)

    def __call__(self, result: StepResult) -> None:
        if result.step <= self._last:
            self._cut(result.step - 1)
        self._last = result.step
        try:
            self._file.append(result.metrics)
            self._failing = False
        except OSError as error:
            if not self._failing:
                tell(
                    f"{self._file.path}: {error.strerror}; its lines are kept in memory and written later.", error=True
                )
            self._failing = True

    def _cut(self, last: int) -> None:
        self._file.keep(lambda row: row["step"] <= last)


def _is_of_a_step(index: int, row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and 0 <= row["step"] < 2**53
