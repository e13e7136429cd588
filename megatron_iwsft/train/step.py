"""One training step: Megatron-Core's schedule over the micro-batches, one global denominator, one optimizer update.

Why the division is ours: the schedule's token counter is an integer and `finalize_model_grads` clamps it to at least 1, but a
denominator may be fractional (`normalize: weights`). So the loss returns sums (three-tuple, `calculate_per_token_loss`), the
gradients are summed over ranks unscaled, and `_finalize` divides them once by the sum that all ranks contributed to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.model.gpt import forward
from megatron_iwsft.model.moe import Balance
from megatron_iwsft.objectives.breakdown import Groups
from megatron_iwsft.objectives.functions import (
    SUMS,
    LossSums,
    ObjectiveFunction,
    Settings,
    Trajectories,
    local_segment_sum,
    micro_batch_loss,
)
from megatron_iwsft.objectives.metrics import summarize
from megatron_iwsft.reference.sidecar import WithCompanions


def run_schedule(
    stages: list[Any],
    batches: list[Batch],
    forward_step: Callable[..., Any],
    parallel: ParallelContext,
    *,
    models: int = 1,
    forward_only: bool,
) -> None:
    """Megatron-Core's pipeline schedule over the micro-batches. models: how many models' hidden states a stage hands on, side by
    side. Collective over the pipeline's ranks.
    """
    iterators = [iter(batches) for _ in stages]
    single = len(stages) == 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=stages[0] if single else stages,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.numel() * parallel.cp.size(),
        micro_batch_size=models,
        forward_only=forward_only,
    )


class LossTotals:
    """Sums of one global batch: added up over micro-batches, then over ranks.

    sums float64 [len(SUMS)]; groups float64 [G, 2], see groups.py; router_balance float64 [], see model/moe.py.
    """

    def __init__(self, device: torch.device, groups: int = 0) -> None:
        self.groups = torch.zeros(groups, 2, dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.weight_max = torch.zeros((), dtype=torch.float64, device=device)
        self.router_balance = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, loss: LossSums) -> None:
        self.sums += loss.sums
        self.weight_max = torch.maximum(self.weight_max, loss.weight_max)

    def reduce(self, parallel: ParallelContext) -> None:
        """Collectives: sum and maximum over data and context parallel ranks, then from the last pipeline stage to all; for the
        routers, of which every rank has some, a sum over all.
        """
        for value in (self.sums, self.groups):
            dist.all_reduce(value, group=parallel.dp_cp)
        dist.all_reduce(self.weight_max, op=dist.ReduceOp.MAX, group=parallel.dp_cp)
        if parallel.pp.size() > 1:
            for value in (self.sums, self.groups, self.weight_max):
                dist.broadcast(value, src=parallel.last_stage_rank, group=parallel.pp)
        dist.all_reduce(self.router_balance)

    @property
    def denominator(self) -> Tensor:
        return self.sums[SUMS.index("denominator")]


@dataclass
class TrainStep:
    """Runs steps of one policy under one objective.

    chunks     this rank's model chunks in Megatron-Core's DistributedDataParallel
    reference  the frozen reference's chunks for a live reference, else None
    proposal   the lagged proposal's chunks, else None: the proposal is the policy itself
    offload    whether their weights stay on the host between forward passes
    router_balance  coefficient of the balance loss of a mixture of experts
    groups     of the corpus's trajectories, whose loss is to be told apart
    """

    chunks: list[Any]
    parallel: ParallelContext
    device: torch.device
    objective: ObjectiveFunction
    settings: Settings
    reference: list[Any] | None = None
    proposal: list[Any] | None = None
    offload: bool = False
    router_balance: float = 0.0
    groups: Groups | None = None

    def __post_init__(self) -> None:
        self._companions = [copy for copy in (self.reference, self.proposal) if copy is not None]
        self._stages = [
            WithCompanions(chunk, [copy[i] for copy in self._companions], offload=self.offload)
            if self._companions
            else chunk
            for i, chunk in enumerate(self.chunks)
        ]
        self._totals = LossTotals(self.device)

    def forward_backward(self, batches: list[Batch]) -> dict[str, float]:
        """Gradients of the global batch's loss into `main_grad`; returns its metrics, the same on every rank."""
        for chunk in self.chunks:
            # Set anew: another TrainStep, for evaluation say, may share these chunks.
            chunk.config.finalize_model_grads_func = self._finalize
            chunk.train()
            chunk.zero_grad_buffer()
        self._run(batches, forward_only=False)
        metrics = summarize(self._totals.sums, self._totals.weight_max)
        if self.router_balance:
            units = metrics["trained_tokens" if self.settings.normalize == "tokens" else "sequences"]
            per_layer = float(self._totals.router_balance) / self.chunks[0].config.num_layers
            metrics["router_balance"] = per_layer / units if units else math.nan
        if self.groups is not None:
            metrics |= self.groups.metrics(self._totals.groups)
        return metrics

    def evaluate(self, batches: list[Batch]) -> LossTotals:
        """The loss's sums over the global batch without gradients, reduced over all ranks."""
        with torch.no_grad():
            self._run(batches, forward_only=True)
        self._totals.reduce(self.parallel)
        return self._totals

    def _run(self, batches: list[Batch], *, forward_only: bool) -> None:
        self._totals = LossTotals(self.device, len(self.groups.names) if self.groups else 0)
        models = 1 + len(self._companions)  # they travel beside the policy
        run_schedule(self._stages, batches, self._forward_step, self.parallel, models=models, forward_only=forward_only)

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):
        batch = next(batches).to(self.device)

        def loss(nll: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            sums = micro_batch_loss(self.objective, self._trajectories(batch, -nll), self.settings)
            self._totals.add(sums)
            if self.groups is not None:
                self._totals.groups += self.groups.sums(batch, -nll[0].detach())
            return sums.loss, torch.ones((), dtype=torch.int, device=self.device), {}

        return forward(model, batch, self._balance(batch)), loss

    def _balance(self, batch: Batch) -> Balance | None:
        if not self.router_balance:
            return None
        per_token = self.settings.normalize == "tokens"
        total = self._totals.router_balance
        return Balance.of(batch, coefficient=self.router_balance, per_token=per_token, total=total)

    def _trajectories(self, batch: Batch, logprobs: Tensor) -> Trajectories:
        """logprobs [1 … 3, T]: the policy's, then those of a live reference and of a lagged proposal where there is one."""
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
            segment_sum=self._segment_sum(batch),
        )

    def _segment_sum(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Sums over whole trajectories. Collective: an all-reduce [S] over context-parallel ranks, which hold parts of them."""
        local = local_segment_sum(batch.segment, batch.num_segments)

        def segment_sum(values: Tensor) -> Tensor:
            out = local(values)
            if self.parallel.cp.size() > 1:
                dist.all_reduce(out, group=self.parallel.cp)
            return out

        return segment_sum

    def _finalize(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Called by the schedule after the last backward: reduce the gradients and divide them by the global denominator."""
        finalize_model_grads(self.chunks, None, **kwargs)
        self._totals.reduce(self.parallel)
        if self._totals.denominator > 0:
            for chunk in self.chunks:
                chunk.scale_gradients(1.0 / self._totals.denominator.item())
