"""The metrics of a training step: one table, read by the loss, the log, the report and the documentation.

A metric of the loss is a ratio of two sums over the global batch, or derived from several; each sum is added up over micro-batches
and ranks first, and divided once. The other metrics are measured by the trainer. This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_iwsft.errors import ConfigError

# Edges of the histogram of weights.
WEIGHT_BINS = (0.125, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0)
HISTOGRAM = tuple(f"weight_bin_{i}" for i in range(len(WEIGHT_BINS) + 1))  # the last: above all edges

Sums = Mapping[str, float]


@dataclass(frozen=True)
class Metric:
    """One row of the table. Raises ConfigError unless exactly one of numerator, derived and measured says where the value comes from.

    name         in metrics.jsonl
    title        for people
    numerator, denominator  names of sums (`loss.SUMS`, or an objective's own); a numerator alone is a count
    derived      a function of all sums, in place of numerator and denominator; nan where it is undefined
    needs        what it is defined for: objectives with weights; with a reference; trajectories that the reference sampled, of which a
                 filter may have kept some (`reference_samples`), or all of what it sampled (`all_samples`)
    measured     by the trainer, not from sums
    timing       differs between two runs that compute the same numbers
    evaluated    of sets of held-out trajectories too; not for a measured metric
    plotted      in reports
    """

    name: str
    title: str
    numerator: str | None = None
    denominator: str | None = None
    derived: Callable[[Sums], Any] | None = None
    needs: Literal["weights", "reference", "reference_samples", "all_samples"] | None = None
    measured: bool = False
    timing: bool = False
    evaluated: bool = True
    plotted: bool = False

    def __post_init__(self) -> None:
        sources = [
            name
            for name, given in (
                ("numerator", self.numerator is not None),
                ("derived", self.derived is not None),
                ("measured", self.measured),
            )
            if given
        ]
        if len(sources) != 1:
            raise ConfigError(
                f"metric {self.name!r} needs one of numerator, derived and measured; it has {', '.join(sources) or 'none'}. For a mean "
                "over trained tokens of a sum in Weighted.extra, write numerator='SUM', denominator='tokens'."
            )
        if self.denominator is not None and self.numerator is None:
            raise ConfigError(
                f"metric {self.name!r} has a denominator without a numerator. Name the sum that is divided."
            )

    def value(self, sums: Sums) -> Any:
        """Of one global batch, from sums over all of it. Not for a measured metric."""
        if self.derived is not None:
            return self.derived(sums)
        assert self.numerator is not None, "measured"
        if self.denominator is None:
            return round(sums[self.numerator])
        return _ratio(sums[self.numerator], sums[self.denominator])


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _effective_sample_size(sums: Sums) -> float:
    """(Σc)²/(nΣc²) of the n units' coefficients in the gradient: a share of the units, between 1/n and 1."""
    return _ratio(sums["coefficient"] ** 2, sums["units"] * sums["coefficient_squared"])


def _spread(sums: Sums) -> float:
    """Standard deviation over trajectories of Σ_t (q_t − r_t)."""
    mean = _ratio(sums["trajectory_log_ratio"], sums["sequences"])
    return math.sqrt(max(0.0, _ratio(sums["trajectory_log_ratio_squared"], sums["sequences"]) - mean**2))


def _standard_error(bound: str) -> Callable[[Sums], float]:
    """Of Σsx/Σs over independent trajectories, to first order: √(Σs²(x − mean)² · n/(n − 1)) / Σs; nan for fewer than two."""

    def standard_error(sums: Sums) -> float:
        mean, n = _ratio(sums[bound], sums["quality"]), sums["sequences"]
        if not n > 1 or math.isnan(mean):
            return math.nan
        squares = sums[f"{bound}_ssxx"] - 2.0 * mean * sums[f"{bound}_ss"] + mean**2 * sums["quality_squared"]
        return math.sqrt(max(0.0, squares) * n / (n - 1.0)) / sums["quality"]

    return standard_error


def _histogram(sums: Sums) -> list[float]:
    """Shares of the units whose weight is below each of `WEIGHT_BINS`, and above the last."""
    return [sums[name] / sums["units"] for name in HISTOGRAM] if sums["units"] else []


METRICS = (
    Metric("step", "finished steps", measured=True),
    Metric("epoch", "epoch, from 0", measured=True),
    Metric("loss", "loss", "loss", "denominator", plotted=True),
    Metric("nll", "negative log-likelihood per trained token", "nll", "tokens", plotted=True),
    Metric("grad_norm", "gradient norm, before clipping", measured=True, plotted=True),
    Metric("lr", "learning rate", measured=True, plotted=True),
    Metric("weight_mean", "mean importance weight", "weight", "units", needs="weights", plotted=True),
    Metric(
        "weight_max",
        "largest importance weight",
        derived=lambda sums: sums["weight_max"],
        needs="weights",
        plotted=True,
    ),
    Metric(
        "weight_ess",
        "effective sample size, share of the weights",
        derived=_effective_sample_size,
        needs="weights",
        plotted=True,
    ),
    Metric("clip_fraction", "share of weights changed by the clip", "clipped", "units", needs="weights", plotted=True),
    Metric(
        "weight_histogram",
        f"shares of weights between {WEIGHT_BINS}",
        derived=_histogram,
        needs="weights",
        evaluated=False,
    ),
    Metric("log_ratio", "mean log-ratio q − r per token", "log_ratio", "tokens", needs="reference"),
    Metric("abs_log_ratio", "mean absolute log-ratio per token", "abs_log_ratio", "tokens", needs="reference"),
    Metric(
        "weighted_log_ratio",
        "mean log-ratio q − r per token, weighted",
        "weighted_log_ratio",
        "token_weight",
        needs="reference",
        plotted=True,
    ),
    Metric(
        "trajectory_log_ratio",
        "mean log-ratio q − r per trajectory",
        "trajectory_log_ratio",
        "sequences",
        needs="reference",
    ),
    Metric("trajectory_log_ratio_std", "its standard deviation over trajectories", derived=_spread, needs="reference"),
    Metric(
        "kl_from_reference",
        "KL(reference‖proposal), nats per token",
        "kl_from_reference",
        "tokens",
        needs="all_samples",
        plotted=True,
    ),
    Metric("bound_sft", "SFT bound / P(D+)", "bound_sft", "quality", needs="reference_samples"),
    Metric("bound_sft_se", "its standard error", derived=_standard_error("bound_sft"), needs="reference_samples"),
    Metric("bound_iw", "iw-SFT bound / P(D+)", "bound_iw", "quality", needs="reference_samples", plotted=True),
    Metric("bound_iw_se", "its standard error", derived=_standard_error("bound_iw"), needs="reference_samples"),
    Metric(
        "not_finite_tokens", "tokens whose log-ratio is not finite", "not_finite", needs="reference", evaluated=False
    ),
    Metric("router_balance", "load-balance loss of the routers, per layer", measured=True),
    Metric("trained_tokens", "trained tokens", "tokens", evaluated=False),
    Metric("sequences", "trajectories with at least one trained token", "sequences", evaluated=False),
    Metric("tokens", "tokens, trained or not", measured=True),
    Metric("skipped_steps", "steps skipped so far because a number was not finite", measured=True),
    Metric("step_time_s", "seconds per step", measured=True, timing=True),
    Metric("tokens_per_s", "tokens per second", measured=True, timing=True, plotted=True),
    Metric("tflops_per_gpu", "model TFLOP/s per GPU", measured=True, timing=True),
    Metric("mfu", "model-FLOPs utilisation: share of the GPU's bf16 peak", measured=True, timing=True),
    Metric("data_s", "waiting for the batch, s", measured=True, timing=True),
    Metric("forward_backward_s", "forward and backward passes, s", measured=True, timing=True),
    Metric("reduce_s", "reducing gradients and waiting for other ranks, s", measured=True, timing=True),
    Metric("optimizer_s", "gradient norm and update, s", measured=True, timing=True),
    Metric("between_steps_s", "evaluation, saving and callbacks after the step before, s", measured=True, timing=True),
    Metric("peak_memory_bytes", "peak memory, bytes", measured=True, timing=True),
    Metric("rank_time_median_s", "batch, forward and backward of the median rank, s", measured=True, timing=True),
    Metric("rank_time_max_s", "batch, forward and backward of the slowest rank, s", measured=True, timing=True),
    Metric("slowest_rank", "the slowest rank", measured=True, timing=True),
)
# Of groups of trajectories: sources, scores, corpora. In training only the first.
BY_GROUP = ("nll", "weight_mean", "log_ratio")
TIMING = frozenset(metric.name for metric in METRICS if metric.timing)


def summarize(sums: Sums, metrics: Iterable[Metric] = METRICS) -> dict[str, Any]:
    """The metrics of one global batch that come from its sums; nan where a batch has no trained tokens."""
    return {metric.name: metric.value(sums) for metric in metrics if not metric.measured}
