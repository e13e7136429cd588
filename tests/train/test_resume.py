"""A resumed run repeats the uninterrupted one: bit for bit at the same layout, within rounding at another."""

from __future__ import annotations

import re
import shutil

import pytest

from megatron_iwsft.testing import comparable_metrics
from megatron_iwsft.train.fit import Machine, fit
from tests.support.iw_sft_runs import RESUMED, RESUMED_ELSEWHERE, config
from tests.support.metrics import assert_close_metrics
from tests.support.shared_runs import SharedRuns, assert_same_checkpoints, train_on

pytestmark = pytest.mark.parallel


def slow_but(first: str, *others: str) -> list:
    """Parameters, of which the default set has the first."""
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("run", slow_but(*RESUMED))
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(run: str, runs: SharedRuns) -> None:
    resumed, uninterrupted = runs(run), runs(RESUMED[run])
    assert comparable_metrics(resumed) == comparable_metrics(uninterrupted)
    assert_same_checkpoints(resumed, uninterrupted)


@pytest.mark.parametrize("run", slow_but(*RESUMED_ELSEWHERE))
def test_a_run_resumes_at_another_layout(run: str, runs: SharedRuns) -> None:
    resumed, uninterrupted = comparable_metrics(runs(run)), comparable_metrics(runs(RESUMED_ELSEWHERE[run]))
    assert_close_metrics(resumed, uninterrupted, 1e-5)


def test_the_doctor_says_what_is_left_of_a_run(runs: SharedRuns) -> None:
    """At the rate that it has attained."""
    runs("cached")
    found = fit(config(runs.directory, "cached", "data.epochs=4"), Machine(0, 10**12), world_size=2)
    said = dict(found.lines)
    assert found.missing == [] and found.trained == 0.5
    assert "after step 14" in said["continues"] and "reference-" in said["reference"]
    assert re.fullmatch(
        r".* per process, (\S+) process hours in all; .* and \S+ process hours of it are left", said["time"]
    )


def test_a_run_resumes_from_the_newest_undamaged_checkpoint(runs: SharedRuns) -> None:
    run = shutil.copytree(runs("cached"), runs.directory / "damaged")
    before, newest = sorted((run / "checkpoints").glob("step-*"))[-2:]
    for file in newest.glob("*.distcp"):
        file.write_bytes(b"")
    for name in ("common.pt", "metadata.json"):  # every rank reads these, not only its own shard
        (before / name).write_bytes(b"")
    train_on(2, config(runs.directory, "damaged"))
    assert comparable_metrics(run) == comparable_metrics(runs("cached"))
    assert_same_checkpoints(run, runs("cached"))
