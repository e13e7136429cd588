"""One training step: Megatron-Core's schedule over the micro-batches, one global denominator, one optimizer update.

Why the division is ours: the schedule's token counter is an integer and `finalize_model_grads` clamps it to at least 1, but a
denominator may be fractional (`normalize: weights`). So the loss returns sums (three-tuple, `calculate_per_token_loss`), the
gradients are summed over ranks unscaled, and `_finalize` divides them once by the sum that all ranks contributed to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_iwsft.batch import Batch
from megatron_iwsft.metrics import summarize
from megatron_iwsft.model.build import forward
from megatron_iwsft.model.moe import Balance
from megatron_iwsft.objectives import SUMS, LossSums, Settings, Trajectories, local_segment_sum, micro_batch_loss
from megatron_iwsft.platform import ParallelContext
from megatron_iwsft.reference import WithReference


class LossTotals:
    """Sums of one global batch: added up over micro-batches, then over ranks. router_balance: see model/moe.py."""

    def __init__(self, device: torch.device) -> None:
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
        dist.all_reduce(self.sums, group=parallel.dp_cp)
        dist.all_reduce(self.weight_max, op=dist.ReduceOp.MAX, group=parallel.dp_cp)
        if parallel.pp.size() > 1:
            for value in (self.sums, self.weight_max):
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
    router_balance  coefficient of the balance loss of a mixture of experts
    """

    chunks: list[Any]
    parallel: ParallelContext
    device: torch.device
    objective: str
    settings: Settings
    reference: list[Any] | None = None
    router_balance: float = 0.0

    def __post_init__(self) -> None:
        references = self.reference or [None] * len(self.chunks)
        self._stages = [c if r is None else WithReference(c, r) for c, r in zip(self.chunks, references, strict=True)]
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
            metrics["router_balance"] = float(self._totals.router_balance) / (units * self.chunks[0].config.num_layers)
        return metrics

    def evaluate(self, batches: list[Batch]) -> LossTotals:
        """The loss's sums over the global batch without gradients, reduced over all ranks."""
        with torch.no_grad():
            self._run(batches, forward_only=True)
        self._totals.reduce(self.parallel)
        return self._totals

    def _run(self, batches: list[Batch], *, forward_only: bool) -> None:
        self._totals = LossTotals(self.device)
        iterators = [iter(batches) for _ in self._stages]
        single = len(self._stages) == 1
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=self._stages[0] if single else self._stages,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel() * self.parallel.cp.size(),
            micro_batch_size=1 if self.reference is None else 2,  # a live reference travels beside the policy
            forward_only=forward_only,
        )

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):
        batch = next(batches).to(self.device)

        def loss(nll: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            sums = micro_batch_loss(self.objective, self._trajectories(batch, -nll), self.settings)
            self._totals.add(sums)
            return sums.loss, torch.ones((), dtype=torch.int, device=self.device), {}

        return forward(model, batch, self._balance(batch)), loss

    def _balance(self, batch: Batch) -> Balance | None:
        if not self.router_balance:
            return None
        per_token = self.settings.normalize == "tokens"
        total = self._totals.router_balance
        return Balance.of(batch, coefficient=self.router_balance, per_token=per_token, total=total)

    def _trajectories(self, batch: Batch, logprobs: Tensor) -> Trajectories:
        """logprobs [1, T], or [2, T] with the live reference's in the second row."""
        policy = logprobs[0]
        proposal = policy.detach()
        reference = logprobs[1].detach() if len(logprobs) == 2 else batch.reference
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
