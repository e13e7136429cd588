"""Stragglers: the slowest rank in the metrics, and a warning when it is slow for long."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.slow_ranks import SlowRanks, rank_times
from tests.support.shared_runs import SharedRuns

STEPS = 50
DATA_PARALLEL = ParallelLayout(data=4)


def warned(ranks_and_times: list[tuple[int, float]], layout: ParallelLayout = DATA_PARALLEL) -> list[str]:
    """What is logged after steps with the given slowest rank and its time, the median being 1 s."""
    said: list[str] = []

    def events(event: str, text: str, **details: Any) -> None:
        assert event == "slow rank"
        said.append(text)

    watch: Any = events
    slow_ranks = SlowRanks(watch, lambda rank: f"rank {rank} (process 1 on node{rank})", layout)
    for step, (rank, seconds) in enumerate(ranks_and_times, start=1):
        metrics = {"slowest_rank": rank, "rank_time_max_s": seconds, "rank_time_median_s": 1.0}
        config: Any = None
        slow_ranks(StepResult(step, 1000, metrics, False, config))
    return said


def test_the_slowest_rank_is_found() -> None:
    found = rank_times(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64), ParallelLayout(data=3))
    assert found == {"rank_time_median_s": 2.0, "rank_time_max_s": 4.0, "slowest_rank": 1}


def test_a_rank_is_compared_with_its_own_pipeline_stage() -> None:
    """With 1F1B, the first stage ends last in every run: with four stages and micro-batches by 1.235 times the median of all ranks."""
    layout = ParallelLayout(pipeline=4, data=3)
    ends = torch.tensor([1.235, 1.05, 0.95, 0.8], dtype=torch.float64).repeat_interleave(3)
    found = rank_times(ends, layout)
    assert found["rank_time_max_s"] == found["rank_time_median_s"], "healthy"
    assert warned([(found["slowest_rank"], 1.0)] * STEPS, layout) == []
    ends[7] *= 1.5  # stage 2 of data-parallel rank 1
    assert rank_times(ends, layout) == {
        "rank_time_median_s": 0.95,
        "rank_time_max_s": pytest.approx(0.95 * 1.5),
        "slowest_rank": 7,
    }


def test_ranks_of_one_model_are_slow_together() -> None:
    """Tensor-parallel ranks wait for each other in every layer: by chance, another one is the slowest in every step."""
    layout = ParallelLayout(tensor=2, pipeline=2, data=3)
    (text,) = warned([((2, 3, 8, 9)[step % 4], 1.5) for step in range(STEPS)], layout)
    assert (
        "rank 3 (process 1 on node3), or one of the 3 other ranks of data-parallel rank 1, has been the slowest" in text
    )


@pytest.mark.parallel
def test_the_times_of_ranks_are_in_the_metrics_of_a_run(runs: SharedRuns) -> None:
    lines = list(map(json.loads, (runs("cached") / "metrics.jsonl").read_text().splitlines()))
    for line in lines:
        assert line["rank_time_max_s"] >= line["rank_time_median_s"] > 0 and line["slowest_rank"] in (0, 1)


def test_a_rank_that_is_slow_for_long_is_named_once() -> None:
    (text,) = warned([(3, 1.5)] * (3 * STEPS))
    assert f"step {STEPS}: rank 3 (process 1 on node3) has been the slowest for {STEPS} steps" in text


def test_a_rank_that_recovers_or_changes_is_not_named() -> None:
    assert warned([(3, 1.5)] * (STEPS - 1) + [(3, 1.1)] + [(3, 1.5)] * (STEPS - 1)) == []
    assert warned([(step % 2, 1.5) for step in range(3 * STEPS)]) == []
    assert warned([(3, 1.1)] * (3 * STEPS)) == [], "slightly slower is no straggler"
