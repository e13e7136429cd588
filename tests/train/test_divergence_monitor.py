"""`DivergenceMonitor`: which steps are not finite, which are spikes, and what a checkpoint keeps of it."""

from __future__ import annotations

import math

from megatron_iwsft.config.schema import Spike
from megatron_iwsft.train.divergence import DivergenceMonitor, Verdict


def test_a_loss_or_gradient_norm_that_is_not_finite_is_detected() -> None:
    monitor = DivergenceMonitor(Spike())
    assert monitor.judge(math.nan, 1.0, 10) == Verdict.NOT_FINITE
    assert monitor.judge(1.0, math.inf, 10) == Verdict.NOT_FINITE
    assert monitor.judge(math.nan, 0.0, 0) == Verdict.GOOD, "a batch without trained tokens has no loss"
    assert monitor.judge(1e30, 1.0, 10) == Verdict.GOOD, "spikes are not detected by default"


def test_skipped_steps_in_a_row_are_counted() -> None:
    monitor = DivergenceMonitor(Spike())
    monitor.skip()
    monitor.skip()
    assert (monitor.skipped, monitor.in_a_row) == (2, 2)
    monitor.updated(1.0)
    assert (monitor.skipped, monitor.in_a_row) == (2, 0)


def test_a_spike_is_measured_against_the_window_before_it() -> None:
    monitor = DivergenceMonitor(Spike(deviations=3.0, window=4))
    for loss in (9.0, 1.0, 1.1, 0.9):
        assert monitor.judge(50.0, 1.0, 10) == Verdict.GOOD, "the window is not full"
        monitor.updated(loss)
    assert monitor.judge(9.0, 1.0, 10) == Verdict.GOOD, "9 is in the window"
    monitor.updated(1.0)
    assert monitor.losses == [1.0, 1.1, 0.9, 1.0]
    deviation = math.sqrt((0.1**2 + 0.1**2) / 4)
    assert monitor.judge(1.0 + 2.99 * deviation, 1.0, 10) == Verdict.GOOD
    assert monitor.judge(1.0 + 3.01 * deviation, 1.0, 10) == Verdict.SPIKE


def test_its_state_is_saved_and_loaded() -> None:
    monitor = DivergenceMonitor(
        Spike(deviations=1.0, window=2), skipped=3, in_a_row=1, rewinds=1, passed_over=[4, 5], losses=[0.1, 0.2]
    )
    other = DivergenceMonitor(monitor.spike)
    other.load_state(monitor.state())
    assert other == monitor
