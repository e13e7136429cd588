"""pass@k and how sure one can be of it; whether one model is better than another on the same problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % confidence interval, all within [0, 1]."""

    mean: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct, from `correct` of `samples`.

    1 − C(n−c, k) / C(n, k): Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 0 < k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples, not {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(correct: Sequence[int], samples: int, k: int) -> Estimate:
    """pass@k over problems, of which problem i was solved by correct[i] of `samples`.

    The interval is Wilson's, over problems as a sample of all such problems. Several samples narrow it as far as rates vary less
    between problems than single successes would: Wilson's with n·p(1−p)/Var problems instead of n (the effective sample size of
    surveys, Korn & Graubard 1998). Unlike the normal approximation it has a width where every problem failed.
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

    difference, low, high  of pass@1, b − a, with a 95 % interval from the paired standard error
    p_value                of an exact two-sided test of no difference
    better, worse, equal   problems
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int
    equal: int


def compare(a: Sequence[int], b: Sequence[int], samples: tuple[int, int]) -> Comparison:
    """a[i], b[i]: how many of samples[0], samples[1] answers to problem i were correct.

    The test: were the models alike, each problem's difference could as well have had the other sign. Every choice of signs is
    counted, so it is exact; with one sample a problem it is McNemar's exact test.
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
    """P(|Σ ± sizes| ≥ observed) under fair signs. The distribution of the sum is built up one problem at a time."""
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)  # of every sum from −total to total
    chances[total] = 1.0
    for size in sizes.tolist():
        chances = 0.5 * (np.roll(chances, size) + np.roll(chances, -size))
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[sums >= observed].sum()))
