"""Stragglers: how long each rank's own work takes, and a warning when one rank is slow for long.

Data-parallel ranks wait for the slowest at the end of every step. Tensor-, context- and pipeline-parallel ranks wait for each other in
every layer or micro-batch, so a slow one makes all of its model's ranks slow: the one that is named stands for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events

_SLOW = 1.2  # times the median
_STEPS = 50


def rank_times(seconds: Tensor) -> dict[str, Any]:
    """Metrics of the ranks' own times, [world]: until the end of the backward passes, before they wait for each other."""
    slowest = int(seconds.argmax())
    return {
        "rank_time_median_s": float(seconds.median()),
        "rank_time_max_s": float(seconds[slowest]),
        "slowest_rank": slowest,
    }


class SlowRanks:
    """Warns when one rank has been the slowest, by a fifth over the median, for 50 steps in a row; once until it recovers.

    describe: a rank's process and host.
    """

    def __init__(self, events: Events, describe: Callable[[int], str]) -> None:
        self._events, self._describe = events, describe
        self._rank, self._steps = -1, 0

    def __call__(self, result: StepResult) -> None:
        slowest, median = result.metrics.get("slowest_rank"), result.metrics.get("rank_time_median_s")
        if slowest is None or median is None:
            return
        longest = result.metrics["rank_time_max_s"]
        if longest < _SLOW * median:
            self._rank, self._steps = -1, 0
            return
        self._rank, self._steps = slowest, self._steps + 1 if slowest == self._rank else 1
        if self._steps == _STEPS:
            self._events(
                "slow rank",
                f"step {result.step}: {self._describe(slowest)} has been the slowest for {_STEPS} steps; now its forward and backward "
                f"passes take {longest:.3g} s, those of the median rank {median:.3g} s. All ranks wait for it. Check that machine, or "
                "leave it out (sbatch --exclude).",
                step=result.step,
                rank=slowest,
            )
