"""One training step: forward and backward over the micro-batches with Megatron-Core's schedule, and the step's metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.distributed.context import ParallelContext, Stopwatch
from megatron_iwsft.model.gpt import PolicyModel, forward
from megatron_iwsft.model.moe import Balance
from megatron_iwsft.objectives.breakdown import Breakdown
from megatron_iwsft.objectives.functions import (
    NORMALIZATIONS,
    Objective,
    Origin,
    Settings,
    Trajectories,
    local_segment_sum,
)
from megatron_iwsft.objectives.loss import micro_batch_loss
from megatron_iwsft.reference.frozen_stage import StageWithFrozenModels
from megatron_iwsft.train.normalization import LossTotals
from megatron_iwsft.train.profiling import range_of


def run_schedule(
    stages: Sequence[torch.nn.Module],
    batches: list[Batch],
    forward_step: Callable[..., Any],
    parallel: ParallelContext,
    *,
    models: int = 1,
    forward_only: bool,
) -> None:
    """Run Megatron-Core's pipeline schedule over the micro-batches. Collective over the pipeline's ranks.

    models: how many models' hidden states a stage passes on, side by side.
    """
    iterators = [iter(batches) for _ in stages]
    single = len(stages) == 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=stages[0] if single else list(stages),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.numel() * parallel.cp.size(),
        micro_batch_size=models,
        forward_only=forward_only,
    )


@dataclass
class TrainStep:
    """Runs steps of one policy under one objective.

    chunks     this rank's model chunks in Megatron-Core's DistributedDataParallel
    reference  the frozen reference's chunks for a live reference (`WithoutAdapters` for the policy's own weights), else None
    proposal   the lagged proposal's chunks, else None: the proposal is the policy itself
    offload    whether their weights stay on the host between forward passes
    router_balance  coefficient of the balance loss of a mixture of experts
    breakdown  of the corpus's trajectories into groups whose metrics are reported
    origin     where the trajectories of the next batches were drawn from, which some metrics depend on
    """

    chunks: list[DistributedDataParallel]
    parallel: ParallelContext
    device: torch.device
    objective: Objective
    settings: Settings
    reference: Sequence[torch.nn.Module] | None = None
    proposal: list[PolicyModel] | None = None
    offload: bool = False
    router_balance: float = 0.0
    breakdown: Breakdown | None = None
    origin: Origin = "other"

    def __post_init__(self) -> None:
        self._frozen = [copy for copy in (self.reference, self.proposal) if copy is not None]
        self._stages = [
            StageWithFrozenModels(chunk, [copy[i] for copy in self._frozen], offload=self.offload)
            if self._frozen
            else chunk
            for i, chunk in enumerate(self.chunks)
        ]
        self._own_time: Stopwatch | None = None
        self._maximum = True
        self._start_totals()

    def _start_totals(self) -> None:
        groups = self.breakdown.zero_sums(self.device) if self.breakdown is not None else None
        parallel = self.parallel
        self._totals = LossTotals(
            self.objective,
            self.device,
            dp_cp=parallel.dp_cp,
            pp=parallel.pp,
            extra=groups,
            origin=self.origin,
        )
        self._router_balance = torch.zeros((), dtype=torch.float64, device=self.device)

    def forward_backward(
        self, batches: list[Batch], own_time: Stopwatch | None = None, *, maximum: bool = True
    ) -> dict[str, Any]:
        """Gradients of the global batch's loss into `main_grad`; returns its metrics, the same on every rank. Collective.

        own_time: stopped when this rank's last backward pass ends, before gradients are reduced and ranks wait for each other.
        maximum: False saves the collective for the largest weight, which then is of this rank alone: the caller finds the largest of
        every rank's `weight_max` along with what else it gathers, and gets the metrics with it from `metrics`.
        """
        self._own_time, self._maximum = own_time, maximum
        for chunk in self.chunks:
            # Set at every step: another TrainStep, for evaluation, may share these chunks.
            chunk.config.finalize_model_grads_func = self._finalize
            chunk.train()
            chunk.zero_grad_buffer()
        self._start_totals()
        self._run(batches, forward_only=False)
        return self.metrics()

    @property
    def weight_max(self) -> float:
        return float(self._totals.weight_max)

    def metrics(self, *, weight_max: float | None = None) -> dict[str, Any]:
        """Of the last `forward_backward`. weight_max: the largest weight on any rank, where that left it out."""
        metrics = self._totals.metrics(weight_max=weight_max)
        if self.router_balance:
            units = metrics["sequences" if self._of_means else "trained_tokens"]
            per_layer = float(self._router_balance) / self.chunks[0].config.num_layers
            metrics["router_balance"] = per_layer / units if units else math.nan
        if self.breakdown is not None and self._totals.extra is not None:
            metrics |= self.breakdown.values(self._totals.extra)
        return metrics

    def evaluating(self, objective: Objective, breakdown: Breakdown | None) -> TrainStep:
        """A step of the same models for `evaluate`, with an objective and groups of its own."""
        other = copy.copy(self)
        other.objective, other.breakdown, other.origin, other.router_balance = objective, breakdown, "other", 0.0
        return other

    def evaluate(self, global_batches: Iterable[list[Batch]]) -> dict[str, Any]:
        """The metrics of several global batches together, without gradients; the same on every rank. Collective."""
        for chunk in self.chunks:
            chunk.eval()  # no dropout in adapters
        self._start_totals()
        with torch.no_grad():
            for batches in global_batches:
                self._run(batches, forward_only=True)
        self._totals.reduce()
        metrics = self._totals.metrics()
        if self.breakdown is not None and self._totals.extra is not None:
            metrics |= self.breakdown.values(self._totals.extra)
        return metrics

    def _run(self, batches: list[Batch], *, forward_only: bool) -> None:
        models = 1 + len(self._frozen)
        run_schedule(self._stages, batches, self._forward_step, self.parallel, models=models, forward_only=forward_only)

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):
        batch = next(batches).to(self.device)

        def loss(logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            with range_of("objective"):
                sums = micro_batch_loss(self.objective, self._trajectories(batch, logprobs), self.settings)
            self._totals.add(sums)
            if self.breakdown is not None and self._totals.extra is not None:
                self._totals.extra += self.breakdown.sums(batch, sums.terms)
            return sums.loss, torch.ones((), dtype=torch.int, device=self.device), {}

        with range_of("forward"):
            return forward(model, batch, self._balance(batch)), loss

    def _balance(self, batch: Batch) -> Balance | None:
        if not self.router_balance:
            return None
        return Balance.of(
            batch, coefficient=self.router_balance, per_token=not self._of_means, total=self._router_balance
        )

    @property
    def _of_means(self) -> bool:
        return NORMALIZATIONS[self.settings.normalize].of_means

    def _trajectories(self, batch: Batch, logprobs: Tensor) -> Trajectories:
        """logprobs [1 … 3, T]: the policy's, then those of a live reference and of a lagged proposal if there are any."""
        policy, *others = logprobs
        reference = others.pop(0).detach() if self.reference is not None else batch.reference
        proposal = others.pop(0).detach() if self.proposal is not None else policy.detach()
        return Trajectories(
            logprobs=policy,
            proposal=proposal,
            reference=proposal if reference is None else reference,
            mask=batch.mask,
            segment=batch.segment,
            lengths=batch.lengths,
            quality=batch.quality,
            turn_weights=batch.turn_weights,
            segment_sum=self._segment_sum(batch),
        )

    def _segment_sum(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Sums over trajectories. Collective: an all-reduce [S] over context-parallel ranks, which hold parts of them."""
        if self.parallel.cp.size() == 1:
            return local_segment_sum(batch.segment, batch.num_segments)
        return local_segment_sum(
            batch.segment, batch.num_segments, reduce=lambda out: dist.all_reduce(out, group=self.parallel.cp)
        )

    def _finalize(self, model: object, num_tokens: Tensor | None = None, **options: Any) -> None:
        """Called by the schedule after the last backward pass; `model` may hold frozen models too, which have no gradients."""
        if self._own_time is not None:
            self._own_time.stop()
        self._totals.finalize(self.chunks, maximum=self._maximum, **options)
        if self.router_balance:
            dist.all_reduce(self._router_balance)  # every rank has some of the routers
