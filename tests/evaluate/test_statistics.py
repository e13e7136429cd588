"""pass@k, its confidence intervals and the paired test, against enumeration and published formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_iwsft.evaluate.statistics import compare, mean_pass_at_k, pass_at_k, student_interval


def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_answer() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        pass_at_k(4, 2, 5)


def test_the_interval_with_one_sample_is_wilsons() -> None:
    z = 1.959963984540054
    for n, solved in ((30, 20), (30, 0), (30, 30), (1319, 700), (1, 1)):
        p = solved / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        found = mean_pass_at_k([1] * solved + [0] * (n - solved), 1, 1)
        assert found.mean == p
        assert found.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-12)
        assert found.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-12)


def test_the_interval_has_95_percent_coverage() -> None:
    """500 benchmarks of 40 problems, drawn from a population with known pass@1 and pass@4."""
    rng = np.random.default_rng(0)
    for k in (1, 4):
        population = rng.beta(0.5, 1.0, 200_000)
        truth = float(np.mean(1 - (1 - population) ** k))
        covered = 0
        for _ in range(500):
            correct = rng.binomial(8, rng.choice(population, 40))
            interval = mean_pass_at_k(correct.tolist(), 8, k)
            covered += interval.low <= truth <= interval.high
        assert 0.92 <= covered / 500 <= 0.98, (k, covered)


def test_more_samples_narrow_the_interval_if_all_problems_have_the_same_pass_rate() -> None:
    one = mean_pass_at_k([1] * 10 + [0] * 10, 1, 1)
    eight = mean_pass_at_k([4] * 20, 8, 1)
    assert one.mean == eight.mean == 0.5
    assert 0 < eight.high - eight.low < 0.5 * (one.high - one.low)


def test_the_paired_test_with_one_sample_is_mcnemars() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = rng.integers(0, 2, 30).tolist(), rng.integers(0, 2, 30).tolist()
        found = compare(a, b, (1, 1))
        better = sum(y > x for x, y in zip(a, b, strict=True))
        worse = sum(y < x for x, y in zip(a, b, strict=True))
        n = better + worse
        tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
        assert found.p_value == pytest.approx(min(1.0, 2 * tail))
        assert (found.better, found.worse, found.equal) == (better, worse, 30 - n)
        assert found.difference == pytest.approx((sum(b) - sum(a)) / 30)


def test_the_paired_test_equals_enumeration_of_all_signs() -> None:
    a, b, samples = [0, 3, 1, 2, 2, 0], [4, 3, 0, 4, 1, 3], (4, 8)
    found = compare(a, b, samples)
    differences = [y / 8 - x / 4 for x, y in zip(a, b, strict=True)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert found.p_value == pytest.approx(sum(s >= abs(sum(differences)) - 1e-12 for s in sums) / len(sums))
    assert found.difference == pytest.approx(sum(differences) / 6)
    error = np.std(differences, ddof=1) / math.sqrt(6)
    assert (found.low, found.high) == pytest.approx(
        (found.difference - 1.959964 * error, found.difference + 1.959964 * error)
    )
    assert compare(a, a, (4, 4)).p_value == 1


def test_intervals_are_students_t() -> None:
    mean, half = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert math.isnan(student_interval([1.0])[1])
