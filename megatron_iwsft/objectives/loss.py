"""An objective on one micro-batch: the loss with its gradient, and the sums that metrics are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_iwsft.objectives.functions import (
    LEVELS,
    NORMALIZATIONS,
    Objective,
    Origin,
    Settings,
    Trajectories,
    Weighted,
    finite,
)
from megatron_iwsft.objectives.metrics import HISTOGRAM, METRICS, WEIGHT_BINS, Metric

# exp of more than this, squared, overflows float64. A bound that needs such a weight is not estimated by any batch.
_MAX_EXPONENT = 300.0


@dataclass(frozen=True)
class _Terms:
    """Per-token terms [T] to be summed; `loss` is already a sum.

    share        1/|M_i| where trained: sums over it count trajectories, also where ranks hold parts of them
    unit         what a weight belongs to: `share` for a trajectory's, the mask for a token's
    quality      s_i, without the weights of turns: the reward, in the bounds
    coefficient  the factor of the unit's log-probs in the gradient, of all of a trajectory's tokens together
    sft, iw      the trajectory's term of each bound, float64
    """

    t: Trajectories
    result: Weighted
    loss: Tensor
    logprobs: Tensor
    quality: Tensor
    weight: Tensor
    unit: Tensor
    share: Tensor
    coefficient: Tensor
    denominator: Tensor
    trajectory_log_ratio: Tensor
    sft: Tensor
    iw: Tensor


# Every micro-batch's sums, in the order in which they are reduced: name → per-token terms (or the sum itself).
SUMS: dict[str, Callable[[_Terms], Tensor]] = {
    "loss": lambda x: x.loss,
    "denominator": lambda x: x.denominator,  # N
    "tokens": lambda x: x.t.mask,
    "sequences": lambda x: x.share,
    "nll": lambda x: -x.logprobs * x.t.mask,
    "units": lambda x: x.unit,
    "weight": lambda x: x.unit * x.weight,
    "clipped": lambda x: x.unit * x.result.clipped,
    "log_ratio": lambda x: x.t.log_ratio,
    "abs_log_ratio": lambda x: x.t.log_ratio.abs(),
    "token_weight": lambda x: x.weight,
    "weighted_log_ratio": lambda x: x.weight * x.t.log_ratio,
    "coefficient": lambda x: x.unit * x.coefficient,
    "coefficient_squared": lambda x: x.unit * x.coefficient**2,
    "trajectory_log_ratio": lambda x: x.share * x.trajectory_log_ratio,
    "trajectory_log_ratio_squared": lambda x: x.share * x.trajectory_log_ratio**2,
    # A mean over trajectories with quality s, and its standard error, need Σs, Σs², Σsx, Σs²x and Σs²x².
    "quality": lambda x: x.share * x.quality,
    "quality_squared": lambda x: x.share * x.quality**2,
    "bound_sft": lambda x: x.share * x.quality * x.sft,
    "bound_sft_ss": lambda x: x.share * x.quality**2 * x.sft,
    "bound_sft_ssxx": lambda x: x.share * (x.quality * x.sft) ** 2,
    "bound_iw": lambda x: x.share * x.quality * x.iw,
    "bound_iw_ss": lambda x: x.share * x.quality**2 * x.iw,
    "bound_iw_ssxx": lambda x: x.share * (x.quality * x.iw) ** 2,
    # Σ_t over samples of the reference: E[exp(q − r)] = 1, so this is an estimate of KL(π_ref‖q), never negative (Schulman's k3).
    "kl_from_reference": lambda x: x.t.mask * (_exp(x.t.log_ratio) - 1.0 - x.t.log_ratio.double()),
    "not_finite": lambda x: x.t.mask * ~(x.t.proposal - x.t.reference).isfinite(),
}


def sum_names(objective: Objective) -> list[str]:
    """The names of `LossSums.sums` under an objective."""
    return [*SUMS, *own_sums(objective), *HISTOGRAM]


def reported_metrics(objective: Objective, origin: Origin = "other") -> list[Metric]:
    """The metrics of an objective's loss, on trajectories that were drawn from `origin`."""
    return [metric for metric in (*METRICS, *objective.metrics) if objective.reports(metric, origin)]


def own_sums(objective: Objective) -> list[str]:
    """The sums of an objective's own metrics, which it returns in `Weighted.extra`."""
    names = [name for metric in objective.metrics for name in (metric.numerator, metric.denominator) if name]
    return [name for name in dict.fromkeys(names) if name not in SUMS]


@dataclass(frozen=True)
class LossSums:
    """One micro-batch's contribution: `loss` [] with gradient; sums float64 [len(sum_names)] and weight_max float64 [] without.

    terms  per-token terms [T] of `SUMS`, for sums over parts of the micro-batch
    """

    loss: Tensor
    sums: Tensor
    weight_max: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def micro_batch_loss(objective: Objective, t: Trajectories, s: Settings) -> LossSums:
    """Evaluate an objective on one micro-batch.

    Sums over a trajectory are written as sums over its tokens of value/|M_i|, so that they add up over context-parallel ranks, each
    of which holds some of the tokens, without counting a trajectory twice. Collective where `t.segment_sum` is.
    """
    norm = NORMALIZATIONS[s.normalize]
    result = objective.function(t, replace(s, clip=objective.clip_of(s)))
    quality = t.quality[t.segment]
    token_quality = quality if t.turn_weights is None else quality * t.turn_weights
    share = t.mask / t.lengths.clamp(min=1.0)[t.segment]
    counted = share if norm.of_means else t.mask
    loss = (token_quality * counted * result.loss).sum()

    with torch.no_grad():
        per_token = objective.per_token or LEVELS[s.level].per_token
        unit_quality = token_quality if per_token else quality * _mean_turn_weight(t)
        coefficient = (unit_quality * counted * result.weight).double() * (1.0 if per_token else t.lengths[t.segment])
        log_ratio, sft, iw = _bound_terms(objective, t)
        terms = _Terms(
            t=t,
            result=result,
            loss=loss.detach(),
            logprobs=t.logprobs.detach(),
            quality=quality.double(),
            weight=result.weight.double(),
            unit=t.mask if per_token else share,
            share=share,
            coefficient=coefficient,
            denominator=counted * token_quality * result.weight if norm.by_weights else counted,
            trajectory_log_ratio=log_ratio,
            sft=sft,
            iw=iw,
        )
        by_name = {name: of(terms) for name, of in SUMS.items()}
        values = [*by_name.values(), *(result.extra[name] for name in own_sums(objective))]
        # bucketize would need the edges as a tensor, and the host would wait for their copy.
        bins = torch.stack([~(result.weight < edge) for edge in WEIGHT_BINS]).sum(dim=0)
        histogram = torch.zeros(len(HISTOGRAM), dtype=torch.float64, device=loss.device)
        histogram.index_add_(0, bins, terms.unit.double())
        sums = torch.cat([torch.stack([value.double().sum() for value in values]), histogram])
        weight_max = result.weight.max().double() if result.weight.numel() else sums.new_zeros(())
    return LossSums(loss=loss, sums=sums, weight_max=weight_max, terms=by_name)


def _mean_turn_weight(t: Trajectories) -> Tensor | float:
    """Of each token's trajectory, [T]; 1 where turns have no weights. Collective where `t.segment_sum` is and turns have weights."""
    if t.turn_weights is None:
        return 1.0
    return (t.segment_sum(t.turn_weights * t.mask) / t.lengths.clamp(min=1.0))[t.segment]


def _bound_terms(objective: Objective, t: Trajectories) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ(q − r), 1 + Σ(ℓ − r), exp(Σ(q − r)) · (1 + Σ(ℓ − q))) of each token's trajectory, float64 [T].

    By 1 + log x ≤ x the latter two are at most p(τ)/π_ref(τ), so their means over samples of the reference that passed the filter are
    lower bounds on J(θ)/P(D+) = E_{D+}[p/π_ref] (arXiv 2507.12856). Neither τ nor a clip applies.
    """
    if not objective.needs_reference:
        zero = torch.zeros(t.mask.shape, dtype=torch.float64, device=t.mask.device)
        return zero, zero, zero
    log_ratio = t.trajectory_log_ratio.double()
    lead = t.segment_sum(finite(t.logprobs.detach() - t.proposal) * t.mask).double()
    terms = torch.stack([log_ratio, 1.0 + log_ratio + lead, _exp(log_ratio) * (1.0 + lead)])
    log_ratio, sft, iw = terms[:, t.segment]
    return log_ratio, sft, iw


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.double().clamp(max=_MAX_EXPONENT).exp()
