"""Batches that are built in a thread while the step before trains."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from megatron_iwsft.data.batch_builder import BatchesAhead
from megatron_iwsft.errors import DataError


class Builder:
    """Remembers which steps were built, in which thread."""

    def __init__(self) -> None:
        self.built: list[int] = []
        self.threads: set[str] = set()
        self.done = threading.Semaphore(0)

    def __call__(self, step: int) -> list:
        if step == 5:
            raise DataError("step 5 is damaged")
        self.built.append(step)
        self.threads.add(threading.current_thread().name)
        self.done.release()
        return [f"batch of step {step}"]


def test_the_next_step_is_built_before_it_is_asked_for() -> None:
    builder = Builder()
    ahead = BatchesAhead(builder, pinned=False)
    assert ahead.at_step(0, following=1) == ["batch of step 0"]
    assert builder.done.acquire(timeout=10) and builder.done.acquire(timeout=10)
    assert builder.built == [0, 1], "without a second call"
    assert ahead.at_step(1, following=None) == ["batch of step 1"]
    ahead.close()
    assert builder.built == [0, 1] and threading.current_thread().name not in builder.threads


def test_a_run_that_goes_back_gets_the_step_that_it_asks_for() -> None:
    ahead = BatchesAhead(Builder(), pinned=False)
    ahead.at_step(7, following=8)
    assert ahead.at_step(3, following=4) == ["batch of step 3"]
    assert ahead.at_step(4, following=None) == ["batch of step 4"]
    ahead.close()


def test_a_damaged_step_is_reported_when_it_is_needed() -> None:
    ahead = BatchesAhead(Builder(), pinned=False)
    assert ahead.at_step(4, following=5) == ["batch of step 4"]
    with pytest.raises(DataError, match="step 5 is damaged"):
        ahead.at_step(5, following=6)
    ahead.close()


class Pinnable:
    """Stands for a micro-batch: pinning memory needs a GPU."""

    def pinned(self) -> str:
        return "pinned"


def test_batches_for_a_gpu_are_pinned() -> None:
    found = {}
    for pinned in (True, False):
        ahead: Any = BatchesAhead(lambda step: [Pinnable()], pinned=pinned)
        found[pinned] = [ahead.at_step(0, following=1), ahead.at_step(1, following=None)]
        ahead.close()
    assert found[True] == [["pinned"], ["pinned"]]
    assert all(isinstance(batch, Pinnable) for batches in found[False] for batch in batches)
