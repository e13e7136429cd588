"""The trainer's metrics agree between layouts, and an overlapped parameter all-gather does not change what is saved."""

from __future__ import annotations

import pytest

from megatron_iwsft.testing import comparable_metrics
from tests.support.iw_sft_runs import LAYOUTS
from tests.support.metrics import assert_close_metrics
from tests.support.shared_runs import SharedRuns, assert_same_checkpoints

pytestmark = pytest.mark.parallel


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, "live-pp2"])
def test_metrics_agree_at_every_layout(layout: str, runs: SharedRuns) -> None:
    assert_close_metrics(comparable_metrics(runs(layout)), comparable_metrics(runs("cached")), 1e-4)


@pytest.mark.slow
def test_overlapped_communication_saves_the_trained_weights(runs: SharedRuns) -> None:
    assert_same_checkpoints(runs("overlap"), runs("dp2"))
