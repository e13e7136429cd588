"""Named metrics from summed ones. Each divides by its own declared denominator, once, after everything is added up."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from megatron_iwsft.objectives.functions import SUMS

# metric → (numerator, denominator), names of `objectives.SUMS`
RATIOS = {
    "loss": ("loss", "denominator"),
    "nll": ("nll", "tokens"),
    "weight_mean": ("weight", "units"),
    "clip_fraction": ("clipped", "units"),
    "log_ratio": ("log_ratio", "tokens"),
    "abs_log_ratio": ("abs_log_ratio", "tokens"),
    # KL(q‖π_ref) = E_q[log q/π_ref], by self-normalised importance sampling with the objective's own (clipped) weights: the
    # unclipped ones have so heavy a tail that one surprising token would be all of the estimate.
    "kl_to_reference": ("weighted_log_ratio", "token_weight"),
    "bound_sft": ("bound_sft", "sequences"),
    "bound_iw": ("bound_iw", "sequences"),
}
# Metrics in which two runs of the same numbers differ.
TIMING = frozenset({"step_time_s", "tokens_per_s", "tflops_per_gpu", "peak_memory_bytes"})

_BINS = [name for name in SUMS if name.startswith("weight_bin_")]


def summarize(sums: Tensor, weight_max: Tensor) -> dict[str, Any]:
    """Metrics of one global batch.

    sums is float64 [len(SUMS)] after reduction over micro-batches, data- and context-parallel ranks. The effective sample
    size is (Σw)²/(nΣw²), a share of the units between 1/n and 1. weight_histogram: shares of the units between
    `objectives.WEIGHT_BINS`. A batch without trained tokens gives NaN.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    out: dict[str, Any] = {
        name: total[top] / total[bottom] if total[bottom] else math.nan for name, (top, bottom) in RATIOS.items()
    }
    squares = total["units"] * total["weight_squared"]
    out["weight_ess"] = total["weight"] ** 2 / squares if squares else math.nan
    out["bound_gap"] = out["bound_iw"] - out["bound_sft"]
    out["weight_histogram"] = [total[name] / total["units"] for name in _BINS] if total["units"] else []
    out["not_finite_tokens"] = round(total["not_finite"])
    out["weight_max"] = float(weight_max)
    out["trained_tokens"] = round(total["tokens"])
    out["sequences"] = round(total["sequences"])
    return out
