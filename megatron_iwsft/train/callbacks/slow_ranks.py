"""Stragglers: how long each rank's own work takes, and a warning when one model replica is slow for long.

Data-parallel ranks wait for the slowest at the end of every step. Tensor-, context- and pipeline-parallel ranks wait for each other in
every layer or micro-batch, so a slow one makes all of its model's ranks slow: the one that is named stands for them. Stages of a pipeline
end at different times in every run, so a rank is compared with its own stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events

_SLOW = 1.2  # times the median
_STEPS = 50


def rank_times(seconds: Tensor, layout: ParallelLayout) -> dict[str, Any]:
    """Metrics of the ranks' own times, [world]: from reading the batch to the end of the backward passes, before ranks wait for each other.

    The slowest rank is the one with the largest time in relation to the median of its pipeline stage, which is the median reported.
    """
    medians = seconds.view(layout.pipeline, -1).median(1).values.repeat_interleave(layout.ranks_per_stage)
    slowest = int((seconds / medians).argmax())
    return {
        "rank_time_median_s": float(medians[slowest]),
        "rank_time_max_s": float(seconds[slowest]),
        "slowest_rank": slowest,
    }


class SlowRanks:
    """Warns when one data-parallel rank has been the slowest, by a fifth over the median, for 50 steps in a row; once until it recovers.

    describe: a rank's process and host.
    """

    def __init__(self, events: Events, describe: Callable[[int], str], layout: ParallelLayout) -> None:
        self._events, self._describe, self._layout = events, describe, layout
        self._replica, self._steps = -1, 0

    def __call__(self, result: StepResult) -> None:
        slowest, median = result.metrics.get("slowest_rank"), result.metrics.get("rank_time_median_s")
        if slowest is None or median is None:
            return
        longest = result.metrics["rank_time_max_s"]
        if longest < _SLOW * median:
            self._replica, self._steps = -1, 0
            return
        _, replica = self._layout.place_of(slowest)
        self._replica, self._steps = replica, self._steps + 1 if replica == self._replica else 1
        if self._steps == _STEPS:
            self._events(
                "slow rank",
                f"step {result.step}: {self._describe(slowest)}{self._others()} has been the slowest for {_STEPS} steps; now reading the "
                f"batch and forward and backward passes take it {longest:.3g} s, the median rank {median:.3g} s. All ranks wait for it. "
                "Check that machine, or leave it out (sbatch --exclude).",
                step=result.step,
                rank=slowest,
            )

    def _others(self) -> str:
        """Ranks of one model wait for each other, so that which of them is slow does not show."""
        count = self._layout.world_size // self._layout.data - 1
        return f", or one of the {count} other ranks of data-parallel rank {self._replica}," if count else ""
