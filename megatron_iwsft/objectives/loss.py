"""An objective on one micro-batch: the loss with its gradient, and the sums that metrics are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iwsft.objectives.functions import Objective, Settings, Trajectories, Weighted
from megatron_iwsft.objectives.metrics import HISTOGRAM, METRICS, WEIGHT_BINS, Metric


@dataclass(frozen=True)
class _Terms:
    """Per-token terms [T] to be summed; `loss` is already a sum.

    share  1/|M_i| where trained: sums over it count trajectories, also where ranks hold parts of them
    unit   what a weight belongs to: `share` for a trajectory's, the mask for a token's
    """

    t: Trajectories
    result: Weighted
    loss: Tensor
    logprobs: Tensor
    weight: Tensor
    unit: Tensor
    share: Tensor
    denominator: Tensor


# Every micro-batch's sums, in the order in which they are reduced: name → per-token terms (or the sum itself).
SUMS: dict[str, Callable[[_Terms], Tensor]] = {
    "loss": lambda x: x.loss,
    "denominator": lambda x: x.denominator,  # N
    "tokens": lambda x: x.t.mask,
    "sequences": lambda x: x.share,
    "nll": lambda x: -x.logprobs * x.t.mask,
    "units": lambda x: x.unit,
    "weight": lambda x: x.unit * x.weight,
    "weight_squared": lambda x: x.unit * x.weight * x.weight,
    "clipped": lambda x: x.unit * x.result.clipped,
    "log_ratio": lambda x: x.t.log_ratio,
    "abs_log_ratio": lambda x: x.t.log_ratio.abs(),
    "token_weight": lambda x: x.weight,
    "weighted_log_ratio": lambda x: x.weight * x.t.log_ratio,
    "bound_sft": lambda x: x.share * torch.nan_to_num(1.0 + x.logprobs - x.t.reference),  # 1 + mean of ℓ − r
    "bound_iw": lambda x: (
        x.share * x.weight * torch.nan_to_num(1.0 + x.logprobs - x.t.proposal)
    ),  # w (1 + mean of ℓ − q)
    "not_finite": lambda x: x.t.mask * ~(x.t.proposal - x.t.reference).isfinite(),
}


def sum_names(objective: Objective) -> list[str]:
    """The names of `LossSums.sums` under an objective."""
    return [*SUMS, *own_sums(objective), *HISTOGRAM]


def reported_metrics(objective: Objective) -> list[Metric]:
    """The metrics of an objective's loss."""
    return [metric for metric in (*METRICS, *objective.metrics) if objective.reports(metric)]


def own_sums(objective: Objective) -> list[str]:
    """The sums of an objective's own metrics, which it returns in `Weighted.extra`."""
    names = [name for metric in objective.metrics for name in (metric.numerator, metric.denominator) if name]
    return [name for name in dict.fromkeys(names) if name not in SUMS]


@dataclass(frozen=True)
class LossSums:
    """One micro-batch's contribution: `loss` [] with gradient; sums float64 [len(sum_names)] and weight_max float64 [] without."""

    loss: Tensor
    sums: Tensor
    weight_max: Tensor


def micro_batch_loss(objective: Objective, t: Trajectories, s: Settings) -> LossSums:
    """Evaluate an objective on one micro-batch.

    Sums over a trajectory are written as sums over its tokens of value/|M_i|, so that they add up over context-parallel ranks, each
    of which holds some of the tokens, without counting a trajectory twice.
    """
    result = objective.function(t, s)
    quality = t.quality[t.segment] if t.turn_weights is None else t.quality[t.segment] * t.turn_weights
    share = t.mask / t.lengths.clamp(min=1.0)[t.segment]
    per_token = quality * (share if s.normalize == "sequences" else 1.0)
    loss = (per_token * result.loss).sum()

    with torch.no_grad():
        terms = _Terms(
            t=t,
            result=result,
            loss=loss.detach(),
            logprobs=t.logprobs.detach(),
            weight=result.weight.double(),
            unit=t.mask if s.level == "token" or objective.per_token else share,
            share=share,
            denominator={"tokens": t.mask, "weights": quality * result.weight, "sequences": share}[s.normalize],
        )
        values = [of(terms) for of in SUMS.values()] + [result.extra[name] for name in own_sums(objective)]
        # bucketize would need the edges as a tensor, and the host would wait for their copy.
        bins = torch.stack([~(result.weight < edge) for edge in WEIGHT_BINS]).sum(dim=0)
        histogram = torch.zeros(len(HISTOGRAM), dtype=torch.float64, device=loss.device)
        histogram.index_add_(0, bins, terms.unit.double())
        sums = torch.cat([torch.stack([value.double().sum() for value in values]), histogram])
        weight_max = result.weight.max().double() if result.weight.numel() else sums.new_zeros(())
    return LossSums(loss=loss, sums=sums, weight_max=weight_max)
