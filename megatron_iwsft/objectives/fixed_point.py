"""Where training with importance weights ends: the policy to which an objective converges on enough data.

With one weight per trajectory, w_i = (p_i/π_i)^κ, and r_i the probability that the filter keeps trajectory i, the stationary point of
Σ_i π_i r_i w_i log p_i is

    p_i ∝ π_i · r_i^(1/(1−κ))

SFT is κ = 0; at κ = 1 only the trajectories with the largest r_i remain, the optimum of reinforcement learning. Weights of level
`trajectory` have κ = τ. Those of level `sequence`, of the mean of T log-ratios, have κ = τ/T. For trajectories of different lengths
p_i/π_i = (r_i/c)^(1/(1−κ_i)) with one constant c. A clip that binds moves the point towards that of SFT.

This module imports no torch.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_iwsft.objectives.functions import Level


def exponent(level: Level, temperature: float, tokens: float) -> float | None:
    """1/(1−κ) for trajectories of `tokens` trained tokens; inf where κ ≥ 1. None for level token, whose weights act on single tokens."""
    if level == "token":
        return None
    kappa = temperature / tokens if level == "sequence" else temperature
    return 1.0 / (1.0 - kappa) if kappa < 1.0 else math.inf


def exponents(num_trained: np.ndarray) -> list[tuple[str, str]]:
    """(name, value) pairs for people: the quartiles of T in a corpus, and the exponents T/(T−τ) there for a few τ.

    num_trained  int [n], at least 1
    """
    if not len(num_trained):
        return []
    quartiles = np.percentile(num_trained, (25, 50, 75)).tolist()
    low, middle, high = quartiles
    out = [
        (
            "trained tokens T",
            f"quartiles {low:,.0f}, {middle:,.0f}, {high:,.0f}; {num_trained.min():,} to {num_trained.max():,}",
        )
    ]
    for temperature in sorted({1.0, 10.0, float(round(middle / 2)), float(round(middle))} - {0.0}):
        powers = [exponent("sequence", temperature, tokens) for tokens in quartiles]
        shown = ", ".join("∞" if power is None or math.isinf(power) else f"{power:.4g}" for power in powers)
        out.append((f"exponent T/(T−τ), τ = {temperature:,.0f}", f"{shown} at these quartiles (1: SFT, ∞: RL)"))
    return out
