"""Warn about importance weights that cannot work, and about degenerate ones, and suggest fixes."""

from __future__ import annotations

import numpy as np

from megatron_iwsft.config.schema import Logging
from megatron_iwsft.objectives.fixed_point import exponent
from megatron_iwsft.objectives.functions import iw_sft
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.check import CheckedRun

_STEPS_BETWEEN_WARNINGS = 100
_IRRELEVANT_BELOW = 1.01
_LARGER = {
    "sequence": "Choose objective.temperature of the order of the trajectories' lengths, or level: trajectory",
    "trajectory": "Choose an objective.temperature near 1",
}


def warn_about_settings(run: CheckedRun, events: Events) -> None:
    """Before the first step: weights that hardly move the optimum, at the lengths of the first epoch; a reference whose refreshing undoes
    them.
    """
    config = run.config
    trained = np.concatenate([corpus.num_trained for corpus in run.mixture.corpora])
    tokens = float(np.median(np.repeat(trained, run.sampler.appearances(0))))
    level, temperature = config.objective.level, config.objective.temperature
    power = exponent(level, temperature, tokens) if run.objective is iw_sft else None
    if power is not None and power < _IRRELEVANT_BELOW:
        events(
            "weights without effect",
            f"the weights move the optimum by next to nothing: it is π_ref · r^{power:.4f}, SFT's is π_ref · r^1 (r: the probability of "
            f"passing the filter), at level {level}, τ = {temperature:g} and a median of {tokens:,.0f} "
            f"trained tokens. {_LARGER[level]}; see docs/objectives.md.",
            exponent=power,
        )
    if config.reference.refresh and run.objective.needs_reference and config.data.drawn_from != "other":
        events(
            "refreshed reference",
            f"data.drawn_from is {config.data.drawn_from}, but reference.refresh replaces the policy that the data were drawn from: "
            "weights relative to the new reference undo what those before have gained. Use reference.refresh: 0, or data drawn anew.",
        )


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
                "clip, or use a larger global batch.",
            )
        if clipped is not None and clipped > self._settings.warn_clipped_above:
            self._warn(
                result.step,
                "weights at the clip",
                f"the clip changes {clipped:.1%} of the weights, which then say little about their trajectories. Lower "
                "objective.temperature or widen objective.clip: the policy has moved far from the reference.",
            )

    def _warn(self, step: int, event: str, text: str) -> None:
        if step - self._last.get(event, -_STEPS_BETWEEN_WARNINGS) >= _STEPS_BETWEEN_WARNINGS:
            self._last[event] = step
            self._events(event, f"step {step}: {text}", step=step)
