"""Importance-weighted supervised fine-tuning on Megatron-Core.

The public API, for training loops of your own: the log-prob operator, the objectives, and the loss with its global denominator. Importing
it loads torch when a name is first used, and never Megatron-Core. Everything else is reached through the command `iwsft`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_iwsft.version import __version__

if TYPE_CHECKING:
    from megatron_iwsft.data.batch import IGNORE
    from megatron_iwsft.objectives.functions import (
        OBJECTIVES,
        Objective,
        Settings,
        Trajectories,
        Weighted,
        dft,
        iw_sft,
        local_segment_sum,
        psft,
        sft,
    )
    from megatron_iwsft.objectives.loss import LossSums, micro_batch_loss
    from megatron_iwsft.objectives.metrics import METRICS, Metric
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob
    from megatron_iwsft.train.normalization import LossTotals

__all__ = [
    "IGNORE",
    "METRICS",
    "OBJECTIVES",
    "LossSums",
    "LossTotals",
    "Metric",
    "Objective",
    "Settings",
    "Trajectories",
    "Weighted",
    "__version__",
    "dft",
    "iw_sft",
    "local_segment_sum",
    "micro_batch_loss",
    "psft",
    "sft",
    "vocab_parallel_logprob",
]

_HOMES = {
    "data.batch": ("IGNORE",),
    "objectives.functions": (
        *("OBJECTIVES", "Objective", "Settings", "Trajectories", "Weighted"),
        *("dft", "iw_sft", "local_segment_sum", "psft", "sft"),
    ),
    "objectives.loss": ("LossSums", "micro_batch_loss"),
    "objectives.metrics": ("METRICS", "Metric"),
    "ops.logprob": ("vocab_parallel_logprob",),
    "train.normalization": ("LossTotals",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
