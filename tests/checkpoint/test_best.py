"""Which checkpoints are the best, through saves that fail and steps that have no evaluation."""

from __future__ import annotations

import json
import math

import pytest

from megatron_iwsft.checkpoint.best import BestCheckpoints
from megatron_iwsft.config.evaluation import Best, StopEarly
from megatron_iwsft.train.early_stop import EarlyStop

NLL = "eval/test/nll"


def best(**settings) -> BestCheckpoints:
    return BestCheckpoints(Best(metric=NLL, **settings))


def judge(found: BestCheckpoints, step: int, value: float) -> list[int]:
    found.judge(step, {NLL: value})
    found.saved()
    return found.steps


def test_the_lowest_values_are_kept_and_of_equal_ones_the_earlier() -> None:
    found = best(keep=2)
    assert judge(found, 0, 0.1) == [], "step 0 has no checkpoint"
    assert judge(found, 1, 3.0) == [1]
    assert judge(found, 2, 2.0) == [2, 1]
    assert judge(found, 3, math.nan) == [2, 1]
    assert judge(found, 4, 2.0) == [2, 4]
    assert judge(found, 5, 2.0) == [2, 4]
    assert not found.wants(5) and found.wants(4)


def test_a_save_that_failed_gives_the_place_back() -> None:
    found = best()
    judge(found, 1, 3.0)
    found.judge(2, {NLL: 2.0})
    assert found.wants(2)
    found.failed()
    assert found.steps == [1]
    assert judge(found, 3, 2.5) == [3], "better than step 1, which is the best one saved"
    found.failed()  # of a save that was none of the best
    assert found.steps == [3]


def test_the_state_survives_a_checkpoint_and_not_another_metric() -> None:
    found = best(mode="max", keep=2)
    for step, value in ((1, 0.1), (2, 1 / 3), (3, 0.2)):
        judge(found, step, value)
    state = json.loads(json.dumps(found.state()))
    again, fewer, other = best(mode="max", keep=2), best(mode="max"), best()
    for one in (again, fewer, other):
        one.load_state(state)
    assert again.entries == found.entries == [(2, 1 / 3), (3, 0.2)]
    assert fewer.steps == [2] and other.steps == []
    assert again.restrict([3]) == [2] and again.steps == [3]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_patience_counts_evaluations_without_an_improvement(mode: str, sign: float) -> None:
    stop = EarlyStop(StopEarly(metric=NLL, mode=mode, patience=2, min_delta=0.1))
    for step, value in ((0, 3.0), (1, 2.5), (2, 2.45), (3, 2.3), (4, 2.25)):
        stop.judge(step, {NLL: sign * value})
        stop.judge(step, {"loss": 0.0})  # no evaluation
        assert not stop.stopped
    state = json.loads(json.dumps(stop.state()))
    again = EarlyStop(stop.settings)
    again.load_state(state)
    again.judge(5, {NLL: math.nan})
    assert again.stopped and again.best_step == 3 and "in 2 evaluations in a row" in again.reason
    patient = EarlyStop(StopEarly(metric=NLL, mode=mode, patience=3))
    patient.load_state(again.state())
    assert not patient.stopped
