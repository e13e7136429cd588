"""Divergence: steps whose loss or gradient is not finite, and loss spikes. Pure bookkeeping, the same on every rank."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from megatron_iwsft.config.schema import Spike


class Verdict(IntEnum):
    """Ordered: the maximum over ranks is the worst."""

    GOOD = 0
    SPIKE = 1
    NOT_FINITE = 2


@dataclass
class DivergenceMonitor:
    """Judges each step before its update, and counts. Part of every checkpoint.

    skipped      steps without an update so far
    in_a_row     how many of the last steps were skipped
    rewinds      so far
    passed_over  steps (counted from 1) that are not trained on, after a rewind
    losses       of the last `window` good steps, oldest first
    """

    spike: Spike
    skipped: int = 0
    in_a_row: int = 0
    rewinds: int = 0
    passed_over: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def judge(self, loss: float, gradient_norm: float, trained_tokens: float) -> Verdict:
        """Before the update. A batch without trained tokens has no loss, which is not an error."""
        if not math.isfinite(gradient_norm) or (trained_tokens and not math.isfinite(loss)):
            return Verdict.NOT_FINITE
        if self.spike.deviations and len(self.losses) == self.spike.window:
            mean = math.fsum(self.losses) / len(self.losses)
            variance = math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses)
            if loss > mean + self.spike.deviations * math.sqrt(variance):
                return Verdict.SPIKE
        return Verdict.GOOD

    def updated(self, loss: float) -> None:
        """After an update."""
        self.in_a_row = 0
        if self.spike.deviations and math.isfinite(loss):
            self.losses = [*self.losses, loss][-self.spike.window :]

    def skip(self) -> None:
        """After a step that was not updated because its numbers were not finite."""
        self.skipped += 1
        self.in_a_row += 1

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "spike"}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
