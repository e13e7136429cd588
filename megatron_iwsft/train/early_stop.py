"""Early stopping: the end of a run whose metric no longer improves. Pure bookkeeping, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_iwsft.config.evaluation import StopEarly


class EarlyStop:
    """Counts evaluations without an improvement. Part of every checkpoint."""

    def __init__(self, settings: StopEarly) -> None:
        self.settings = settings
        self.best: float | None = None
        self.best_step = 0
        self.without_improvement = 0

    def judge(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After each step; one without the metric changes nothing. A value that is not finite is no improvement."""
        if self.settings.metric not in metrics:
            return
        value, sign = float(metrics[self.settings.metric]), self.settings.sign
        better = self.best is None or sign * (self.best - value) > self.settings.min_delta
        if math.isfinite(value) and better:
            self.best, self.best_step, self.without_improvement = value, step, 0
        else:
            self.without_improvement += 1

    @property
    def stopped(self) -> bool:
        return self.without_improvement >= self.settings.patience

    @property
    def reason(self) -> str:
        """Why the run has stopped, for people."""
        best = (
            "never had a finite value"
            if self.best is None
            else f"is not better than {self.best:.6g} (step {self.best_step})"
        )
        delta = f" by more than {self.settings.min_delta:g}" if self.settings.min_delta else ""
        return (
            f"{self.settings.metric} {best}{delta} in {self.without_improvement} evaluations in a row (run.stop_early)"
        )

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.settings.metric,
            "mode": self.settings.mode,
            "best": self.best,
            "best_step": self.best_step,
            "without_improvement": self.without_improvement,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Values of another metric are of no use."""
        if (state["metric"], state["mode"]) != (self.settings.metric, self.settings.mode):
            self.best, self.best_step, self.without_improvement = None, 0, 0
            return
        self.best, self.best_step = state["best"], state["best_step"]
        self.without_improvement = state["without_improvement"]
