"""The section `evaluation` of a config, and what its metrics decide: which checkpoints are kept, and when the run ends."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_iwsft.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from megatron_iwsft.objectives.functions import OBJECTIVES
from megatron_iwsft.objectives.metrics import METRICS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class EvaluationSet(Section):
    """One corpus of held-out trajectories."""

    name: Name
    """Of the set in metrics and messages: letters, digits, and . _ - after the first."""
    corpus: str
    """Corpus directory, made with the same tokenizer."""
    max_trajectories: PositiveInt | None = None
    """Evaluate so many of its trajectories, drawn once: the same in every evaluation and every run. null: all of them."""


class Evaluation(Section):
    """Metrics of held-out trajectories, before the first step, every few steps, and after the last."""

    every: NonNegativeInt = 0
    """Steps between evaluations. 0: only before the first step and after the last."""
    sets: list[EvaluationSet] = []
    """Held-out corpora: a list of mappings with the keys name, corpus (a directory) and max_trajectories.
    name: of the set in metrics: eval/NAME/nll, and eval/NAME/nll/source … for each source.
    max_trajectories: evaluate so many, drawn once, the same in every evaluation. By default all."""

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        if self.every and not self.sets:
            raise ValueError(f"every is {self.every}, but there is nothing to evaluate: add sets, or leave out every")
        names = [entry.name for entry in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sets: two have the name {twice}")
        return self


class MetricChoice(Section):
    """A metric of an evaluation, and which of two of its values is better."""

    metric: str
    """A metric of an evaluation set, such as eval/NAME/nll."""
    mode: Literal["min", "max"] | None = None
    """Whether lower or higher values are better. null: min for loss and nll; other metrics need it."""

    @property
    def sign(self) -> float:
        """Times the metric's value: lower is better."""
        return -1.0 if self.mode == "max" else 1.0


class Best(MetricChoice):
    """Keep the checkpoints with the best values of a metric, beside the newest ones."""

    keep: PositiveInt = 1
    """How many of them."""


class StopEarly(MetricChoice):
    """End the run, with exit status 0, when a metric no longer improves."""

    patience: PositiveInt
    """Evaluations in a row without an improvement after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """An improvement is a value better than the best before it by more than this."""


def metric_problem(choice: MetricChoice, evaluation: Evaluation, objective: str) -> str | None:
    """Why a metric cannot be chosen, in one sentence; None if it can. An objective from a file can have any metric."""
    known = evaluated_metrics(evaluation, objective)
    if not known:
        return f"metric {choice.metric} needs evaluation.sets, which is empty"
    if choice.metric not in known and not (objective not in OBJECTIVES and _of_a_set(choice.metric, evaluation)):
        near = difflib.get_close_matches(choice.metric, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Metrics of this run: {', '.join(known)}."
        return f"metric {choice.metric} is none that this run evaluates. {hint}"
    if choice.mode is None and choice.metric.rpartition("/")[2] not in ("nll", "loss"):
        return f"metric {choice.metric} needs mode: min or mode: max"
    return None


def evaluated_metrics(evaluation: Evaluation, objective: str) -> list[str]:
    """The metrics of every evaluation of a run, apart from those of groups. Of a custom objective those that all can have."""
    known = OBJECTIVES.get(objective)
    metrics = known.evaluated if known else [m for m in METRICS if m.evaluated and not m.measured]
    return [f"eval/{entry.name}/{metric.name}" for entry in evaluation.sets for metric in metrics]


def _of_a_set(metric: str, evaluation: Evaluation) -> bool:
    return any(metric.startswith(f"eval/{entry.name}/") for entry in evaluation.sets)
