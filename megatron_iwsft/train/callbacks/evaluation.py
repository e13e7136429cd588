"""The metrics of held-out trajectories: before the first step, every few steps, and after the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.batch_builder import BatchBuilder
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.breakdown import break_down
from megatron_iwsft.objectives.functions import sft
from megatron_iwsft.objectives.metrics import BY_GROUP
from megatron_iwsft.reference.mixture import MixtureSidecars
from megatron_iwsft.reference.sidecar import has_sidecar
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.held_out import HeldOutSet
from megatron_iwsft.train.setup import raise_together

if TYPE_CHECKING:
    from megatron_iwsft.train.trainer import Trainer


class SetEvaluation:
    """Evaluates one set. Every method is collective over all ranks.

    Weights and log-ratios need log-probs of the reference. With a cached reference, those of this set may be missing: then the event log
    says so, and the metrics are those of SFT.
    """

    def __init__(self, trainer: Trainer, held: HeldOutSet) -> None:
        run = trainer.run
        self.name, self._held, self._trainer = held.name, held, trainer
        cached = run.objective.needs_reference and run.config.reference.source == "cached"
        reference = _sidecars(trainer, held) if cached else None
        objective = sft if cached and reference is None else run.objective
        self.metrics = {metric.name for metric in objective.evaluated}
        by_group = tuple(metric for metric in objective.evaluated if metric.name in BY_GROUP)
        groups = break_down(np.full(len(held.corpus), np.nan), held.mixture.sources(), metrics=by_group)
        self._step = trainer.step.evaluating(objective, groups)
        self._builder: BatchBuilder = run.batches(held.mixture, held.sampler, reference, groups)

    def __call__(self, result: StepResult) -> dict[str, Any]:
        """The set's metrics, as eval/NAME/METRIC, and those of its groups."""
        found = self._step.evaluate(self._global_batches(result.step))
        groups = {name: value for name, value in found.items() if "/source " in name}
        own = {name: value for name, value in found.items() if name in self.metrics}
        return {f"eval/{self._held.name}/{name}": value for name, value in (own | groups).items()}

    def _global_batches(self, step: int) -> Iterator[list[Batch]]:
        plan = self._held.plan
        for index in range(plan.num_steps):
            self._trainer.watch.at(step, f"evaluation of {self._held.name}, batch {index + 1} of {plan.num_steps}")
            yield self._builder.from_packs(plan.step(index))


def evaluation(trainer: Trainer) -> Callable[[StepResult], dict[str, Any]]:
    """A collective callback that evaluates all of `evaluation.sets`. Raises ConfigError if a chosen metric cannot be computed."""
    sets = [SetEvaluation(trainer, held) for held in trainer.run.held_out]
    _check_choices(trainer.run.config, sets)

    def evaluate(result: StepResult) -> dict[str, Any]:
        trainer.state.gather_parameters()
        metrics: dict[str, Any] = {}
        for held in sets:
            metrics |= held(result)
        return metrics

    return evaluate


def _check_choices(config: Config, sets: list[SetEvaluation]) -> None:
    """What could not be checked with the config alone: sidecars, and a custom objective's metrics."""
    available = [f"eval/{held.name}/{metric}" for held in sets for metric in sorted(held.metrics)]
    available += config.evaluation.answers.metrics
    for key, choice in config.metric_choices.items():
        if choice.metric not in available:
            raise ConfigError(
                f"{key}.metric is {choice.metric}, which cannot be computed: its set has no log-probs of the reference, or the objective "
                f"has no such metric. Choose one of {', '.join(available)}."
            )


def _sidecars(trainer: Trainer, held: HeldOutSet) -> MixtureSidecars | None:
    """The set's reference log-probs, verified, each rank some of their files; None, with an event, if there are none."""
    run = trainer.run
    identity = on_first_rank(lambda: run.reference_identity(held.corpus))
    if not on_first_rank(lambda: has_sidecar(held.corpus, identity)):
        trainer.events(
            "evaluation without reference",
            f"evaluation set {held.name} has no log-probs of the reference, so its weights and log-ratios are not computed, only its loss. "
            f"To have them, run `iwsft reference` with this config and data.corpus={held.corpus.directory} data.corpora=[].",
            set=held.name,
        )
        return None
    sidecars = MixtureSidecars(held.mixture, [identity])
    raise_together(sidecars.damage(run.platform.rank, run.platform.world_size))
    return sidecars
