"""pass@k with confidence intervals, a paired test of two models on the same problems, and intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)
# Two-sided 95 % points of Student's t, degrees of freedom 1 to 20.
_STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % confidence interval, all within [0, 1]."""

    mean: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct, from `correct` out of `samples`.

    1 − C(n−c, k) / C(n, k): Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples, not {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(correct: Sequence[int], samples: int, k: int) -> Estimate:
    """Mean pass@k over problems, where correct[i] of the `samples` answers to problem i are correct.

    The interval is Wilson's, treating the problems as a sample of all such problems. With several samples per problem, pass rates
    vary less between problems than single outcomes do; the number of problems n is then replaced by the effective sample size
    n·p(1−p)/Var (Korn & Graubard 1998). Unlike the normal approximation, its width is not 0 when every problem fails.
    """
    rates = np.array([pass_at_k(samples, c, k) for c in correct])
    n, p = len(rates), float(rates.mean())
    variance = float(rates.var())
    effective = float(n * samples) if variance == 0 and 0 < p < 1 else float(n)
    if variance > 0:
        effective = min(n * p * (1 - p) / variance, n * samples)
    centre = (p + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
    half = _Z / (1 + _Z**2 / effective) * math.sqrt(p * (1 - p) / effective + (_Z / (2 * effective)) ** 2)
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


@dataclass(frozen=True)
class Comparison:
    """Model b against model a on the same problems.

    difference, low, high  pass@1 of b minus that of a, with a 95 % interval from the paired standard error
    p_value                exact two-sided test of no difference
    better, worse, equal   number of problems
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int
    equal: int


def compare(a: Sequence[int], b: Sequence[int], samples: tuple[int, int]) -> Comparison:
    """Compare two models. a[i], b[i]: correct answers to problem i, out of samples[0] and samples[1].

    The test is an exact sign-flip permutation test: under the null hypothesis, each problem's difference is equally likely to have
    either sign. With one sample per problem it is McNemar's exact test.
    """
    common = math.lcm(*samples)
    counts = np.asarray(b) * (common // samples[1]) - np.asarray(a) * (common // samples[0])
    differences = counts / common
    mean, n = float(differences.mean()), len(differences)
    half = _Z * float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Comparison(
        difference=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        p_value=_sign_flip_p(np.abs(counts[counts != 0]), abs(int(counts.sum()))),
        better=int((counts > 0).sum()),
        worse=int((counts < 0).sum()),
        equal=int((counts == 0).sum()),
    )


def _sign_flip_p(sizes: np.ndarray, observed: int) -> float:
    """P(|Σ ± sizes| ≥ observed) with random signs. Convolves the distribution of the sum, one problem at a time."""
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)  # probability of every sum from −total to total
    chances[total] = 1.0
    for size in sizes.tolist():
        chances = 0.5 * (np.roll(chances, size) + np.roll(chances, -size))
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[sums >= observed].sum()))


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval from Student's t (NaN for a single value)."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    t = _STUDENT_95[n - 2] if n - 2 < len(_STUDENT_95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)
