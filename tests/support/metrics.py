"""Comparison of the metrics of two runs."""

from __future__ import annotations

import pytest


def assert_close_metrics(found: list[dict], expected: list[dict], tolerance: float) -> None:
    """Loss, gradient norm and weights of every step agree within a relative tolerance."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for key in ("loss", "nll", "grad_norm", "weight_mean", "weight_ess"):
            assert a[key] == pytest.approx(b[key], rel=tolerance), (a["step"], key)
