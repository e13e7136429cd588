"""iw-SFT against its reference: weights start at one, a cached reference equals a live one, and training moves away from it."""

from __future__ import annotations

import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.testing import comparable_metrics
from tests.support.shared_runs import SharedRuns

pytestmark = pytest.mark.parallel


def test_the_loss_falls(runs: SharedRuns) -> None:
    nll = [m["nll"] for m in comparable_metrics(runs("cached"))]
    assert nll[-1] < nll[0] - 0.1


def test_sft_logs_no_weights(runs: SharedRuns) -> None:
    assert "weight_mean" not in comparable_metrics(runs("sft"))[0]


def test_each_epoch_trains_on_every_trajectory_once(runs: SharedRuns) -> None:
    corpus = Corpus.open(runs.directory / "corpus")
    lines = comparable_metrics(runs("cached"))
    for epoch in (0, 1):
        of_epoch = [m for m in lines if m["epoch"] == epoch]
        assert sum(m["sequences"] for m in of_epoch) == len(corpus)
        assert sum(m["tokens"] for m in of_epoch) == corpus.lengths.sum()
        assert sum(m["trained_tokens"] for m in of_epoch) == corpus.num_trained.sum()


OTHER_LAYOUTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "dp2", "cp2", "live-pp2")]


@pytest.mark.parametrize("run", ["cached", "live", *OTHER_LAYOUTS])
def test_weights_are_one_before_the_first_update(run: str, runs: SharedRuns) -> None:
    first = comparable_metrics(runs(run))[0]
    assert abs(first["weight_max"] - 1) <= 1e-6
    assert abs(first["weight_mean"] - 1) <= 1e-6


def test_a_live_reference_starts_equal_to_the_policy_bit_for_bit(runs: SharedRuns) -> None:
    assert comparable_metrics(runs("live"))[0]["abs_log_ratio"] == 0


def test_weights_move_away_from_one(runs: SharedRuns) -> None:
    assert comparable_metrics(runs("cached"))[-1]["weight_max"] > 1.05


def test_cached_and_live_references_give_equal_metrics(runs: SharedRuns) -> None:
    """Bit for bit: the reference was computed with the same layout, packs and batch sizes."""
    assert comparable_metrics(runs("cached")) == comparable_metrics(runs("live"))
