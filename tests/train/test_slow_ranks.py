"""Stragglers: the slowest rank in the metrics, and a warning when it is slow for long."""

from __future__ import annotations

from typing import Any

import torch

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.slow_ranks import SlowRanks, rank_times

STEPS = 50


def warned(ranks_and_times: list[tuple[int, float]]) -> list[str]:
    """What is logged after steps with the given slowest rank and its time, the median being 1 s."""
    said: list[str] = []

    def events(event: str, text: str, **details: Any) -> None:
        assert event == "slow rank"
        said.append(text)

    watch: Any = events
    slow_ranks = SlowRanks(watch, lambda rank: f"rank {rank} (process 1 on node{rank})")
    for step, (rank, seconds) in enumerate(ranks_and_times, start=1):
        metrics = {"slowest_rank": rank, "rank_time_max_s": seconds, "rank_time_median_s": 1.0}
        config: Any = None
        slow_ranks(StepResult(step, 1000, metrics, False, config))
    return said


def test_the_slowest_rank_is_found() -> None:
    found = rank_times(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    assert found == {"rank_time_median_s": 2.0, "rank_time_max_s": 4.0, "slowest_rank": 1}


def test_a_rank_that_is_slow_for_long_is_named_once() -> None:
    (text,) = warned([(3, 1.5)] * (3 * STEPS))
    assert f"step {STEPS}: rank 3 (process 1 on node3) has been the slowest for {STEPS} steps" in text


def test_a_rank_that_recovers_or_changes_is_not_named() -> None:
    assert warned([(3, 1.5)] * (STEPS - 1) + [(3, 1.1)] + [(3, 1.5)] * (STEPS - 1)) == []
    assert warned([(step % 2, 1.5) for step in range(3 * STEPS)]) == []
    assert warned([(3, 1.1)] * (3 * STEPS)) == [], "slightly slower is no straggler"
