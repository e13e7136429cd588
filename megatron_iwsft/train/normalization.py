"""One global denominator: a batch's sums over micro-batches and ranks, and the division of its gradients.

Why Megatron-Core's own division does not serve: its schedule counts tokens in an integer, which `finalize_model_grads` clamps to at least
1, but a denominator may be fractional (`normalize: weights`, `sequence_weights`). So losses are sums (three-tuples,
`calculate_per_token_loss`), gradients are summed over ranks unscaled, and `LossTotals.finalize` divides them once, by the sum that all
ranks contributed to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.objectives.functions import Objective, Origin
from megatron_iwsft.objectives.loss import LossSums, reported_metrics, sum_names
from megatron_iwsft.objectives.metrics import summarize


class LossTotals:
    """The sums of one global batch under one objective: add micro-batches, `finalize` or `reduce` once, then read.

    Calls in another order raise RuntimeError: a second reduction would count each sum once per rank, and sums that are read before it
    are this rank's alone.

    dp_cp      group of the data- and context-parallel ranks, which hold different micro-batches or parts of them
    pp         group of the pipeline's stages, of which the last one has the loss; None without pipeline parallelism

    sums       float64 [len(sum_names(objective))]
    weight_max float64 []
    extra      float64, any shape, summed in the same way as `sums`: for sums that are not the objective's
    origin     where the trajectories were drawn from: some metrics are defined only for samples of the reference
    """

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        *,
        dp_cp: dist.ProcessGroup,
        pp: dist.ProcessGroup | None = None,
        extra: Tensor | None = None,
        origin: Origin = "other",
    ) -> None:
        self.objective, self.origin, self._dp_cp, self._pp = objective, origin, dp_cp, pp
        self.sums = torch.zeros(len(sum_names(objective)), dtype=torch.float64, device=device)
        self.weight_max = torch.zeros((), dtype=torch.float64, device=device)
        self.extra = extra
        self._reduced = False

    def add(self, loss: LossSums) -> None:
        """Add a micro-batch."""
        self._require_unreduced()
        self.sums += loss.sums
        self.weight_max = torch.maximum(self.weight_max, loss.weight_max)

    def reduce(self, *, maximum: bool = True) -> None:
        """Sum over ranks; every rank then has the same. Collectives: a sum and a maximum over `dp_cp`, and with a pipeline a broadcast
        from its last stage.

        maximum: False leaves out the one of `weight_max`, which the caller then finds and passes to `metrics`.
        """
        self._require_unreduced()
        self._reduced = True
        parts = [self.sums] if self.extra is None else [self.sums, self.extra]
        together = torch.cat([*(part.flatten() for part in parts), self.weight_max.view(1)])
        dist.all_reduce(together[:-1], group=self._dp_cp)
        if maximum:
            dist.all_reduce(together[-1:], op=dist.ReduceOp.MAX, group=self._dp_cp)
        if self._pp is not None and self._pp.size() > 1:
            dist.broadcast(together, src=dist.get_process_group_ranks(self._pp)[-1], group=self._pp)
        for part, value in zip(
            (*parts, self.weight_max), together.split([*(p.numel() for p in parts), 1]), strict=True
        ):
            part.copy_(value.view_as(part))

    def finalize(
        self, chunks: list[Any], num_tokens: Tensor | None = None, *, maximum: bool = True, **options: Any
    ) -> None:
        """Reduce the gradients of `chunks` (Megatron-Core's DistributedDataParallel) and divide them by the global denominator.

        To be set as `TransformerConfig.finalize_model_grads_func`, which the schedule calls after the last backward pass. Collective:
        Megatron-Core's gradient reduction, and `reduce`.
        """
        from megatron.core.distributed import finalize_model_grads

        self._require_unreduced()
        finalize_model_grads(chunks, None, **options)
        self.reduce(maximum=maximum)
        if self["denominator"] > 0:
            for chunk in chunks:
                chunk.scale_gradients(1.0 / self["denominator"])

    def __getitem__(self, name: str) -> float:
        """A sum by its name, after `reduce`."""
        self._require_reduced()
        return self.sums[sum_names(self.objective).index(name)].item()

    def metrics(self, *, weight_max: float | None = None) -> dict[str, Any]:
        """The objective's metrics, after `reduce`: the same on every rank. weight_max: of all ranks, where `reduce` left it out."""
        self._require_reduced()
        largest = float(self.weight_max) if weight_max is None else weight_max
        sums = dict(zip(sum_names(self.objective), self.sums.tolist(), strict=True))
        return summarize(sums | {"weight_max": largest}, reported_metrics(self.objective, self.origin))

    def _require_unreduced(self) -> None:
        if self._reduced:
            raise RuntimeError(
                "LossTotals is reduced already (`finalize` includes `reduce`); make a new one for each global batch"
            )

    def _require_reduced(self) -> None:
        if not self._reduced:
            raise RuntimeError(
                "LossTotals holds this rank's sums only; call `reduce` on all ranks first (`finalize` includes it)"
            )
