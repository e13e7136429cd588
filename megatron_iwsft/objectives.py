"""The objectives: log-probs in, a per-token loss and summed metrics out.

Source: Qin & Springenberg, arXiv 2507.12856. With policy log-probs ℓ_t (gradient), reference r_t and proposal q_t,

    L = −(1/N) Σ_i s_i Σ_{t∈M_i} sg[w_t] · ℓ_t

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


def sft(t: Trajectories, s: Settings) -> Weighted:
    """Supervised fine-tuning: w_t = 1."""
    return Weighted(loss=-t.logprobs * t.mask, weight=t.mask, clipped=torch.zeros_like(t.mask))


def iw_sft(t: Trajectories, s: Settings) -> Weighted:
    """Importance-weighted SFT: w = clip(exp(τ·(q − r))), of a trajectory's mean log-ratio or of each token's."""
    log_ratio = (t.proposal - t.reference) * t.mask
    if s.level == "sequence":
        log_ratio = (t.segment_sum(log_ratio) / t.lengths.clamp(min=1.0))[t.segment]
    ratio = torch.exp((s.temperature * log_ratio).clamp(max=_MAX_LOG_RATIO))
    low, high = s.clip
    weight = ratio.clamp(low, high) * t.mask
    clipped = ((ratio < low) | (ratio > high)).to(t.mask.dtype) * t.mask
    return Weighted(loss=-weight * t.logprobs, weight=weight, clipped=clipped)


OBJECTIVES: dict[str, Callable[[Trajectories, Settings], Weighted]] = {"sft": sft, "iw_sft": iw_sft}
NEEDS_REFERENCE = frozenset({"iw_sft"})

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
)


@dataclass(frozen=True)
class LossSums:
    """One micro-batch's contribution. `loss` carries the gradient; `sums` is float64 [len(SUMS)] without one."""

    loss: Tensor
    sums: Tensor
    weight_max: Tensor


def micro_batch_loss(name: str, t: Trajectories, s: Settings) -> LossSums:
    """Evaluate objective `name` on one micro-batch.

    Sums over a trajectory are written as sums over its tokens of value/|M_i|, so that they add up over
    context-parallel ranks, each of which holds some of the tokens, without counting a trajectory twice.
    """
    out = OBJECTIVES[name](t, s)
    quality = t.quality[t.segment]
    share = t.mask / t.lengths.clamp(min=1.0)[t.segment]
    per_token = quality * (share if s.normalize == "sequences" else 1.0)
    loss = (per_token * out.loss).sum()

    with torch.no_grad():
        unit = t.mask if s.level == "token" else share
        log_ratio = (t.proposal - t.reference) * t.mask
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
            "log_ratio": log_ratio,
            "abs_log_ratio": log_ratio.abs(),
            "token_weight": weight,
            "weighted_log_ratio": weight * log_ratio,
            "bound_sft": share * (1.0 + logprobs - t.reference),
            "bound_iw": share * weight * (1.0 + logprobs - t.proposal),
        }
        sums = torch.stack([values[key].double().sum() for key in SUMS])
        weight_max = out.weight.max().double() if out.weight.numel() else sums.new_zeros(())
    return LossSums(loss=loss, sums=sums, weight_max=weight_max)
