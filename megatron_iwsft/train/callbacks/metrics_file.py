"""metrics.jsonl: one line per step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import finite
from megatron_iwsft.utils.files import write_text


class MetricsFile:
    """Appends each step's metrics, after removing what an interrupted run wrote beyond step `resumed_at`.

    When a step is repeated after a rewind, what was written since its first time is removed. If the disk is full, lines are kept in
    memory and written later.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path, self._waiting = path, ""
        self._last = self._size = 0
        self._cut(resumed_at)

    def __call__(self, result: StepResult) -> None:
        if result.step <= self._last:
            self._cut(result.step - 1)
        self._waiting += json.dumps(finite(result.metrics)) + "\n"
        self._last = result.step
        self._append()

    def _cut(self, last: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]
        if kept != lines:
            write_text(self.path, "".join(kept))
        self._last, self._size = last, sum(len(line.encode()) for line in kept)

    def _append(self) -> None:
        data = self._waiting.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.tell() != self._size:
                    file.truncate(self._size)
                written = file.write(data)
        except OSError as error:
            message = f"{self.path}: {error.strerror}; its lines are kept in memory and written later."
            print(message, file=sys.stderr, flush=True)
            return
        if written == len(data):  # else the disk filled up within a line, which is truncated and written again
            self._size, self._waiting = self._size + written, ""
