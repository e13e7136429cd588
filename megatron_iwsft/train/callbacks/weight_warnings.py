"""Warn about degenerate importance weights and suggest fixes."""

from __future__ import annotations

from megatron_iwsft.config.schema import Logging
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events

_STEPS_BETWEEN_WARNINGS = 100


class WeightWarnings:
    """Warns, at most every hundred steps, when few weights dominate a batch or the clip decides most of them."""

    def __init__(self, settings: Logging, events: Events) -> None:
        self._settings, self._events = settings, events
        self._last: dict[str, int] = {}

    def __call__(self, result: StepResult) -> None:
        ess, clipped = result.metrics.get("weight_ess"), result.metrics.get("clip_fraction")
        if ess is not None and ess < self._settings.warn_ess_below:
            self._warn(
                result.step,
                "low effective sample size",
                f"the effective sample size is {ess:.1%} of the batch: a few weights dominate it. Lower objective.temperature or the upper "
                "clip, use a larger global batch, or refresh the reference.",
            )
        if clipped is not None and clipped > self._settings.warn_clipped_above:
            self._warn(
                result.step,
                "weights at the clip",
                f"the clip changes {clipped:.1%} of the weights, which then say little about their trajectories. Lower "
                "objective.temperature, widen objective.clip, or refresh the reference: the policy has moved far from it.",
            )

    def _warn(self, step: int, event: str, text: str) -> None:
        if step - self._last.get(event, -_STEPS_BETWEEN_WARNINGS) >= _STEPS_BETWEEN_WARNINGS:
            self._last[event] = step
            self._events(event, f"step {step}: {text}", step=step)
