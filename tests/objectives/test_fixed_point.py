"""The exponents that `iwsft inspect` shows. That they are those of training is tested in tests/test_theory.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_iwsft.objectives.fixed_point import exponent, exponents

pytestmark = pytest.mark.numerics


def test_exponents_depend_on_the_level() -> None:
    assert exponent("sequence", 5.0, 20) == pytest.approx(4 / 3)
    assert exponent("sequence", 20.0, 20) == exponent("trajectory", 1.0, 20) == math.inf
    assert exponent("trajectory", 0.5, 20) == exponent("trajectory", 0.5, 20_000) == 2.0
    assert exponent("token", 1.0, 20) is None


def test_a_corpus_is_described_by_quartiles_and_some_temperatures() -> None:
    rows = dict(exponents(np.array([10, 20, 40, 80, 100])))
    assert rows.pop("trained tokens T") == "quartiles 20, 40, 80; 10 to 100"
    assert list(rows) == [f"exponent T/(T−τ), τ = {tau}" for tau in (1, 10, 20, 40)]
    assert rows["exponent T/(T−τ), τ = 20"].startswith("∞, 2, 1.333 at these quartiles")
    assert exponents(np.zeros(0, int)) == []
