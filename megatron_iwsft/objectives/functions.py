"""The objectives: SFT, iw-SFT, DFT and PSFT, as pure functions of log-probs. `OBJECTIVES` is the table of them.

Source: Qin & Springenberg, arXiv 2507.12856. With the policy's log-probs ℓ_t (with gradient), the reference's r_t and the proposal's q_t,

    L = −(1/N) Σ_i s_i Σ_{t∈M_i} sg[w_t] · ℓ_t

(PSFT, arXiv 2508.17784, is not of this form; DFT, arXiv 2508.05629, is, with w_t = π_θ(a_t).)

No Megatron-Core, no collectives. A trajectory may be split over context-parallel ranks: the sum over all of it comes in as
`Trajectories.segment_sum`. The division by N happens once, after all micro-batches and ranks are summed (`train/step.py`).
This module imports no torch, so that a config is checked against the table before torch is loaded.

Shapes: T tokens of this rank in this micro-batch, S trajectories (segments) in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.metrics import METRICS, Metric

if TYPE_CHECKING:
    from torch import Tensor

Normalize = Literal["tokens", "weights", "sequences", "sequence_weights"]
Level = Literal["sequence", "trajectory", "token"]
Clip = tuple[float, float]
# Where the trajectories of a corpus came from; see `data.drawn_from` in the schema.
Origin = Literal["other", "reference", "reference_filtered"]

# exp of more than this overflows float32; a ratio that large is far above every sensible clip.
_MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class WeightLevel:
    """One way to make importance weights of log-ratios.

    log_ratio  the log-ratio that a token's weight is made of: of its trajectory or of the token itself, float32 [T]
    clip       default bounds of the weights
    per_token  whether each token has a weight of its own
    """

    log_ratio: Callable[[Trajectories], Tensor]
    clip: Clip
    per_token: bool = False


LEVELS: Mapping[Level, WeightLevel] = {
    "sequence": WeightLevel(lambda t: (t.trajectory_log_ratio / t.lengths.clamp(min=1.0))[t.segment], (0.0, 16.0)),
    # Symmetric in log space. Sums spread much more than means: with a lower bound no trajectory is lost for good, and the upper one bounds
    # its share of a batch. A narrower clip ends the improvement early: it moves odds from those of SFT by at most high/low.
    "trajectory": WeightLevel(lambda t: t.trajectory_log_ratio[t.segment], (0.05, 20.0)),
    "token": WeightLevel(lambda t: t.log_ratio, (0.2, 1.8), per_token=True),
}


@dataclass(frozen=True)
class Normalization:
    """What the loss is divided by.

    of_means    whether a trajectory enters with the mean of its tokens, instead of their sum
    by_weights  whether weights and quality are summed in the denominator, instead of counting tokens or trajectories
    """

    of_means: bool
    by_weights: bool


NORMALIZATIONS: Mapping[Normalize, Normalization] = {
    "tokens": Normalization(of_means=False, by_weights=False),
    "weights": Normalization(of_means=False, by_weights=True),
    "sequences": Normalization(of_means=True, by_weights=False),
    "sequence_weights": Normalization(of_means=True, by_weights=True),
}


@dataclass(frozen=True)
class Trajectories:
    """What an objective sees of one micro-batch.

    logprobs   float32 [T]  ℓ_t, with gradient; 0 where not trained
    proposal   float32 [T]  q_t, without gradient
    reference  float32 [T]  r_t, without gradient (equal to `proposal` where the objective needs no reference)
    mask       float32 [T]  1 where trained on
    segment    int64   [T]  index of the token's trajectory, 0 … S−1
    lengths    float32 [S]  |M_i|, over the full trajectory on all ranks; 0 for filler
    quality    float32 [S]  s_i
    turn_weights  float32 [T] or None  weight of the token's turn, a factor of s_i; None where all are 1
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
    turn_weights: Tensor | None = None

    @cached_property
    def log_ratio(self) -> Tensor:
        """q_t − r_t, float32 [T], 0 where not trained.

        Low precision can give a token probability 0 on one side, which makes the difference infinite: it counts as ±80, which every
        clip cuts. Where both sides give 0 the difference counts as 0. `loss.py` counts such tokens as `not_finite_tokens`.
        """
        return finite(self.proposal - self.reference) * self.mask

    @cached_property
    def trajectory_log_ratio(self) -> Tensor:
        """Σ_t (q_t − r_t) of each trajectory, float32 [S]. Collective where `segment_sum` is."""
        return self.segment_sum(self.log_ratio)


@dataclass(frozen=True)
class Settings:
    """The `objective` section of a config, as the functions here need it.

    clip: bounds of the weights; None for the objective's default at this level, which `micro_batch_loss` fills in
    """

    level: Level = "sequence"
    temperature: float = 1.0
    clip: Clip | None = None
    normalize: Normalize = "tokens"


@dataclass(frozen=True)
class Weighted:
    """An objective's result, per token.

    loss    float32 [T]  with gradient, before quality and normalisation; 0 where not trained
    weight  float32 [T]  w_t, without gradient; 0 where not trained
    clipped float32 [T]  1 where the clip changed the weight
    extra   float32 [T] each, 0 where not trained: summed under its name for the objective's own `metrics`
    """

    loss: Tensor
    weight: Tensor
    clipped: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


ObjectiveFunction = Callable[[Trajectories, Settings], Weighted]


@dataclass(frozen=True, eq=False)
class Objective:
    """An objective, built in or custom, with everything the trainer needs to know about it. Compared and hashed by identity.

    name             in configs and logs
    function         computes the loss and weights of a micro-batch
    needs_reference  whether it reads `reference`; if not, none is loaded or computed
    weighted         whether weights vary, so weight metrics are logged
    per_token        whether a weight belongs to a token at every level
    uses_proposal    whether it can follow a lagged proposal
    default_clip     by level, where it is not the level's own
    metrics          its own, of sums of `Weighted.extra`

    Raises ConfigError for a metric of its own that has the name of another metric, or that only the trainer could measure.
    """

    name: str
    function: ObjectiveFunction
    needs_reference: bool = True
    weighted: bool = True
    per_token: bool = False
    uses_proposal: bool = True
    default_clip: Mapping[Level, Clip] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        taken = {metric.name for metric in METRICS}
        for metric in self.metrics:
            if metric.name in taken:
                raise ConfigError(
                    f"objective {self.name}: there is already a metric {metric.name!r}. Choose another name."
                )
            if metric.measured:
                raise ConfigError(
                    f"objective {self.name}: metric {metric.name!r} is marked as measured, which only the trainer's own metrics are. "
                    "Give it a numerator or derived."
                )
            taken.add(metric.name)

    def proposal_conflict(self, kind: str) -> str | None:
        """Why it cannot run with `objective.proposal.kind`, in one sentence; None if it can."""
        if kind == "current" or self.uses_proposal:
            return None
        return f"proposal.kind {kind} needs iw_sft or a custom objective that uses the proposal; {self.name} uses none"

    def clip_at(self, level: Level) -> Clip:
        """The default bounds of the weights."""
        return self.default_clip.get(level, LEVELS[level].clip)

    def clip_of(self, s: Settings) -> Clip:
        """The bounds of the weights under `s`."""
        return self.clip_at(s.level) if s.clip is None else s.clip

    def reports(self, metric: Metric, origin: Origin = "other") -> bool:
        """Whether `metric` is defined under this objective, for trajectories that were drawn from `origin`."""
        if metric.needs is None:
            return True
        if metric.needs == "weights":
            return self.weighted
        origins = {
            "reference": get_args(Origin),
            "reference_samples": get_args(Origin)[1:],
            "all_samples": ("reference",),
        }
        return self.needs_reference and origin in origins[metric.needs]

    @property
    def evaluated(self) -> list[Metric]:
        """The metrics that are reported of held-out trajectories."""
        return [m for m in (*METRICS, *self.metrics) if m.evaluated and not m.measured and self.reports(m)]


def local_segment_sum(
    segment: Tensor, num_segments: int, *, reduce: Callable[[Tensor], object] | None = None
) -> Callable[[Tensor], Tensor]:
    """A `segment_sum`: sums in float64, returns float32 [S].

    reduce: adds up float64 [S] in place over the ranks that hold parts of the trajectories. In float64, because the parts of a long
    trajectory may be large and cancel. None: trajectories are entirely on this rank.
    """

    def segment_sum(values: Tensor) -> Tensor:
        values = values.double()
        out = values.new_zeros(num_segments).index_add_(0, segment, values)
        if reduce is not None:
            reduce(out)
        return out.float()

    return segment_sum


def finite(log_ratio: Tensor) -> Tensor:
    """Replace infinite log-ratios by ±80, undefined ones by 0."""
    return log_ratio.nan_to_num(nan=0.0, posinf=_MAX_LOG_RATIO, neginf=-_MAX_LOG_RATIO)


def _sft(t: Trajectories, s: Settings) -> Weighted:
    """Supervised fine-tuning: w_t = 1."""
    return Weighted(loss=-t.logprobs * t.mask, weight=t.mask, clipped=t.mask.new_zeros(t.mask.shape))


def _iw_sft(t: Trajectories, s: Settings) -> Weighted:
    """Importance-weighted SFT: w = clip(exp(τ·log-ratio)): of a trajectory's mean or sum, or of each token."""
    ratio = (s.temperature * LEVELS[s.level].log_ratio(t)).clamp(max=_MAX_LOG_RATIO).exp()
    low, high = iw_sft.clip_of(s)
    weight = ratio.clamp(low, high) * t.mask
    clipped = ((ratio < low) | (ratio > high)).to(t.mask.dtype) * t.mask
    return Weighted(loss=-weight * t.logprobs, weight=weight, clipped=clipped)


def _dft(t: Trajectories, s: Settings) -> Weighted:
    """Dynamic fine-tuning (arXiv 2508.05629): w_t = π_θ(a_t)."""
    weight = t.logprobs.detach().exp() * t.mask
    return Weighted(loss=-weight * t.logprobs, weight=weight, clipped=t.mask.new_zeros(t.mask.shape))


def _psft(t: Trajectories, s: Settings) -> Weighted:
    """Proximal SFT (arXiv 2508.17784): −min(ρ, clip(ρ, lo, hi)), ρ = π_θ(a_t)/π_ref(a_t). The weight is the gradient's factor."""
    low, high = psft.clip_of(s)
    ratio = finite(t.logprobs - t.reference).clamp(max=_MAX_LOG_RATIO).exp()
    loss = -ratio.minimum(ratio.clamp(low, high)) * t.mask
    clipped = (ratio.detach() > high).to(t.mask.dtype) * t.mask
    return Weighted(loss=loss, weight=ratio.detach() * (1.0 - clipped) * t.mask, clipped=clipped)


sft = Objective("sft", _sft, needs_reference=False, weighted=False, uses_proposal=False)
iw_sft = Objective("iw_sft", _iw_sft)
dft = Objective("dft", _dft, needs_reference=False, per_token=True, uses_proposal=False)
psft = Objective(
    "psft",
    _psft,
    per_token=True,
    uses_proposal=False,
    default_clip=dict.fromkeys(LEVELS, (0.8, 1.28)),
)

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (sft, iw_sft, dft, psft)}
