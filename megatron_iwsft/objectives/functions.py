"""The objectives: log-probs in, a per-token loss and summed metrics out.

Source: Qin & Springenberg, arXiv 2507.12856. With policy log-probs ℓ_t (gradient), reference r_t and proposal q_t,

    L = −(1/N) Σ_i s_i Σ_{t∈M_i} sg[w_t] · ℓ_t

(PSFT, arXiv 2508.17784, is not of this form; DFT, arXiv 2508.05629, is with w_t = π_θ(a_t).)

Pure functions of tensors: no Megatron-Core, no collectives. A trajectory may be spread over context-parallel ranks; the one
sum that must see all of it comes in as `Trajectories.segment_sum`. Every function here returns *sums*; the division by
the one global denominator N happens once, after all micro-batches and ranks are added up (`step.py`).

Shapes: T tokens of this rank in this micro-batch, S trajectories (segments) in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["tokens", "weights", "sequences"]
Level = Literal["sequence", "token"]

# exp of more than this overflows float32; a ratio that large is far above every sensible clip.
_MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Trajectories:
    """What an objective sees of one micro-batch.

    logprobs   float32 [T]  ℓ_t, with gradient; 0 where not trained
    proposal   float32 [T]  q_t, without gradient
    reference  float32 [T]  r_t, without gradient (equal to `proposal` where the objective needs no reference)
               Where q_t − r_t is not a number it counts as 0, where infinite as ±80: see `log_ratio`
    mask       float32 [T]  1 where trained on
    segment    int64   [T]  index of the token's trajectory, 0 … S−1
    lengths    float32 [S]  |M_i|, over all of the trajectory wherever it lies; 0 for filler
    quality    float32 [S]  s_i
    segment_sum  [T] → [S]  sum over every token of each trajectory, on all ranks that hold a part of it
    """

    logprobs: Tensor
    proposal: Tensor
    reference: Tensor
    mask: Tensor
    segment: Tensor
    lengths: Tensor
    quality: Tensor
    segment_sum: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """The `objective` section of a config, as the functions here need it."""

    level: Level = "sequence"
    temperature: float = 1.0
    clip: tuple[float, float] = (0.0, 16.0)
    normalize: Normalize = "tokens"


@dataclass(frozen=True)
class Weighted:
    """An objective's answer, per token.

    loss    float32 [T]  with gradient, before quality and normalisation; 0 where not trained
    weight  float32 [T]  w_t, without gradient; 0 where not trained
    clipped float32 [T]  1 where the clip changed the weight
    """

    loss: Tensor
    weight: Tensor
    clipped: Tensor


def local_segment_sum(segment: Tensor, num_segments: int) -> Callable[[Tensor], Tensor]:
    """The `segment_sum` for trajectories that lie wholly on this rank. Sums in float64, returns float32 [S]."""

    def segment_sum(values: Tensor) -> Tensor:
        out = torch.zeros(num_segments, dtype=torch.float64, device=values.device)
        return out.index_add_(0, segment, values.double()).float()

    return segment_sum


def log_ratio(t: Trajectories) -> Tensor:
    """q_t − r_t, float32 [T], 0 where not trained.

    A token that one side gave no probability at all, in low precision, makes it infinite: ±80 then, which every clip cuts. One
    that both did is no evidence: 0. `micro_batch_loss` counts them (`not_finite`).
    """
    return torch.nan_to_num(t.proposal - t.reference, nan=0.0, posinf=_MAX_LOG_RATIO, neginf=-_MAX_LOG_RATIO) * t.mask


def sft(t: Trajectories, s: Settings) -> Weighted:
    """Supervised fine-tuning: w_t = 1."""
    return Weighted(loss=-t.logprobs * t.mask, weight=t.mask, clipped=torch.zeros_like(t.mask))


def iw_sft(t: Trajectories, s: Settings) -> Weighted:
    """Importance-weighted SFT: w = clip(exp(τ·(q − r))), of a trajectory's mean log-ratio or of each token's."""
    evidence = log_ratio(t)
    if s.level == "sequence":
        evidence = (t.segment_sum(evidence) / t.lengths.clamp(min=1.0))[t.segment]
    ratio = torch.exp((s.temperature * evidence).clamp(max=_MAX_LOG_RATIO))
    low, high = s.clip
    weight = ratio.clamp(low, high) * t.mask
    clipped = ((ratio < low) | (ratio > high)).to(t.mask.dtype) * t.mask
    return Weighted(loss=-weight * t.logprobs, weight=weight, clipped=clipped)


def dft(t: Trajectories, s: Settings) -> Weighted:
    """Dynamic fine-tuning (arXiv 2508.05629): w_t = π_θ(a_t)."""
    weight = torch.exp(t.logprobs.detach()) * t.mask
    return Weighted(loss=-weight * t.logprobs, weight=weight, clipped=torch.zeros_like(t.mask))


def psft(t: Trajectories, s: Settings) -> Weighted:
    """Proximal SFT (arXiv 2508.17784): −min(ρ, clip(ρ, lo, hi)), ρ = π_θ(a_t)/π_ref(a_t). A token's weight is its gradient's."""
    low, high = s.clip
    change = torch.nan_to_num(t.logprobs - t.reference, nan=0.0, posinf=_MAX_LOG_RATIO, neginf=-_MAX_LOG_RATIO)
    ratio = torch.exp(change.clamp(max=_MAX_LOG_RATIO))
    loss = -torch.minimum(ratio, ratio.clamp(low, high)) * t.mask
    clipped = (ratio.detach() > high).to(t.mask.dtype) * t.mask
    return Weighted(loss=loss, weight=ratio.detach() * (1.0 - clipped) * t.mask, clipped=clipped)


ObjectiveFunction = Callable[[Trajectories, Settings], Weighted]
OBJECTIVES: dict[str, ObjectiveFunction] = {"sft": sft, "iw_sft": iw_sft, "dft": dft, "psft": psft}
NEEDS_REFERENCE = frozenset({iw_sft, psft})
PER_TOKEN = frozenset({dft, psft})  # a weight belongs to a token, whatever the level


# Edges of the histogram of weights.
WEIGHT_BINS = (0.125, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0)

# The sums that every micro-batch contributes, in the order in which they are reduced. `metrics.summarize` divides them.
SUMS = (
    "loss",  # Σ s_i · loss, as normalised below
    "denominator",  # N
    "tokens",  # Σ |M_i|
    "sequences",  # trajectories with at least one trained token
    "nll",  # Σ −ℓ_t over tokens
    "units",  # what a weight belongs to: trajectories at sequence level, tokens at token level
    "weight",  # Σ w over units
    "weight_squared",  # Σ w² over units
    "clipped",  # units whose weight the clip changed
    "log_ratio",  # Σ (q_t − r_t) over tokens
    "abs_log_ratio",  # Σ |q_t − r_t| over tokens
    "token_weight",  # Σ w_t over tokens
    "weighted_log_ratio",  # Σ w_t (q_t − r_t) over tokens
    "bound_sft",  # Σ 1 + x over trajectories, x the mean of ℓ − r
    "bound_iw",  # Σ w (1 + mean of ℓ − q) over trajectories
    "not_finite",  # tokens whose log-ratio was not finite
    *(
        f"weight_bin_{i}" for i in range(len(WEIGHT_BINS) + 1)
    ),  # units whose weight lies below WEIGHT_BINS[i], the last: above all
)


@dataclass(frozen=True)
class LossSums:
    """One micro-batch's contribution. `loss` carries the gradient; `sums` is float64 [len(SUMS)] without one."""

    loss: Tensor
    sums: Tensor
    weight_max: Tensor


def micro_batch_loss(objective: ObjectiveFunction, t: Trajectories, s: Settings) -> LossSums:
    """Evaluate an objective on one micro-batch.

    Sums over a trajectory are written as sums over its tokens of value/|M_i|, so that they add up over
    context-parallel ranks, each of which holds some of the tokens, without counting a trajectory twice.
    """
    out = objective(t, s)
    quality = t.quality[t.segment]
    share = t.mask / t.lengths.clamp(min=1.0)[t.segment]
    per_token = quality * (share if s.normalize == "sequences" else 1.0)
    loss = (per_token * out.loss).sum()

    with torch.no_grad():
        unit = t.mask if s.level == "token" or objective in PER_TOKEN else share
        ratio = log_ratio(t)
        weight = out.weight.double()
        denominator = {
            "tokens": t.mask,
            "weights": quality * out.weight,
            "sequences": share,
        }[s.normalize]
        logprobs = t.logprobs.detach()
        values = {
            "loss": loss.detach(),
            "denominator": denominator,
            "tokens": t.mask,
            "sequences": share,
            "nll": -logprobs * t.mask,
            "units": unit,
            "weight": unit * weight,
            "weight_squared": unit * weight * weight,
            "clipped": unit * out.clipped,
            "log_ratio": ratio,
            "abs_log_ratio": ratio.abs(),
            "token_weight": weight,
            "weighted_log_ratio": weight * ratio,
            "bound_sft": share * torch.nan_to_num(1.0 + logprobs - t.reference),
            "bound_iw": share * weight * torch.nan_to_num(1.0 + logprobs - t.proposal),
            "not_finite": t.mask * ~(t.proposal - t.reference).isfinite(),
        }
        bins = torch.bucketize(out.weight, out.weight.new_tensor(WEIGHT_BINS), right=True)
        histogram = unit.new_zeros(len(WEIGHT_BINS) + 1, dtype=torch.float64).index_add_(0, bins, unit.double())
        sums = torch.stack([value.double().sum() for value in values.values()])
        sums = torch.cat([sums, histogram])
        weight_max = out.weight.max().double() if out.weight.numel() else sums.new_zeros(())
    return LossSums(loss=loss, sums=sums, weight_max=weight_max)
