"""Callbacks: functions that are called after steps with their results. Logging, evaluation, export and saving are callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_iwsft.config.schema import Config


@dataclass(frozen=True)
class StepResult:
    """A finished step.

    step, total_steps  finished steps so far, and of the complete run
    metrics      as in metrics.jsonl; what a callback returns is added for those called after it
    stopping     whether the run was asked to stop, and will save and leave after this step
    config       the run's
    """

    step: int
    total_steps: int
    metrics: dict[str, Any]
    stopping: bool
    config: Config

    @property
    def is_last(self) -> bool:
        return self.step == self.total_steps


CallbackFunction = Callable[[StepResult], dict[str, Any] | None]


@dataclass(frozen=True)
class Callback:
    """`function` after every `every`-th step (0 for none), after the last one with `at_end`, and before the first one with `at_start`.

    Before the first step the result is that of step 0, without metrics of training.
    collective: called on every rank, else on the main rank only. phase: what the watchdog calls it, for a collective one.
    saves: writes the model, after everything else.
    """

    function: CallbackFunction
    every: int = 1
    at_end: bool = False
    at_start: bool = False
    collective: bool = False
    phase: str = "callback"
    saves: bool = False

    @property
    def order(self) -> int:
        """Collective callbacks come first, since the loggers on the main rank need the metrics that they return; saving comes last."""
        return 2 if self.saves else 0 if self.collective else 1

    def due(self, result: StepResult) -> bool:
        if result.step == 0:
            return self.at_start
        return (self.every > 0 and result.step % self.every == 0) or (self.at_end and result.is_last)
