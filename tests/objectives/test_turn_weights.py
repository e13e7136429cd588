"""Weights of turns multiply the loss of their tokens, and so what a trajectory counts in the gradient; no reward depends on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_iwsft.objectives.functions import LEVELS, NORMALIZATIONS, OBJECTIVES, Level, Normalize, Settings, iw_sft
from megatron_iwsft.objectives.loss import micro_batch_loss, sum_names
from tests.objectives.test_objectives import LENGTHS, data, metrics_of, trajectories

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "weights"])
def test_the_loss_is_the_weighted_sum_of_token_losses(normalize: str) -> None:
    ell, r, mask, segment, quality = data()
    turns = np.random.default_rng(1).choice([0.25, 1.0, 3.0], len(ell))
    t = replace(trajectories(ell, r, mask, segment, quality), turn_weights=torch.tensor(turns, dtype=torch.float32))
    objective = OBJECTIVES["iw_sft"]
    found = micro_batch_loss(objective, t, Settings(normalize=normalize))
    counts = np.array([mask[segment == i].sum() for i in range(len(quality))])
    mean = np.array([((ell - r) * mask)[segment == i].sum() for i in range(len(quality))]) / np.maximum(counts, 1)
    weight = np.clip(np.exp(mean), 0, 16)[segment] * mask
    share = (1 / np.maximum(counts, 1))[segment] if normalize == "sequences" else 1.0
    factor = quality[segment] * turns * weight * share
    assert float(found.loss) == pytest.approx(-(factor * ell).sum(), rel=1e-6)
    found.loss.backward()
    assert t.logprobs.grad is not None
    assert np.allclose(t.logprobs.grad.numpy(), -factor, rtol=1e-6, atol=1e-9)
    denominator = {
        "tokens": mask.sum(),
        "sequences": (counts > 0).sum(),
        "weights": (quality[segment] * turns * weight).sum(),
    }
    sums = dict(zip(sum_names(objective), found.sums.tolist(), strict=True))
    assert sums["denominator"] == pytest.approx(denominator[normalize], rel=1e-6)
    assert sums["nll"] == pytest.approx(-(ell * mask).sum(), rel=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_effective_sample_size_is_that_of_the_gradient(level: Level, normalize: Normalize) -> None:
    """(Σc)²/(nΣc²), c by autograd: of a trajectory the sum over its tokens, whose turns have different weights."""
    ell, r, mask, segment, quality = data()
    turns = np.random.default_rng(2).choice([0.25, 1.0, 3.0], len(ell))
    t = replace(trajectories(ell, r, mask, segment, quality), turn_weights=torch.tensor(turns, dtype=torch.float32))
    out = micro_batch_loss(iw_sft, t, Settings(level, clip=(0.1, 2.0), normalize=normalize))
    out.loss.backward()
    assert t.logprobs.grad is not None
    of_tokens = -t.logprobs.grad.numpy().astype(np.float64)
    of_trajectories = np.array([of_tokens[segment == i].sum() for i in range(len(LENGTHS))])
    c = of_tokens[mask == 1] if level == "token" else of_trajectories
    assert metrics_of(iw_sft, out)["weight_ess"] == pytest.approx(c.sum() ** 2 / len(c) / (c**2).sum(), rel=1e-5)


def test_the_reward_in_the_bounds_is_the_trajectorys_quality() -> None:
    ell, r, mask, segment, quality = data(spread=0.3)
    turns = np.random.default_rng(3).choice([0.25, 1.0, 3.0], len(ell))
    plain = trajectories(ell, r, mask, segment, quality)
    t = replace(plain, turn_weights=torch.tensor(turns, dtype=torch.float32))
    found, without = (
        metrics_of(iw_sft, micro_batch_loss(iw_sft, x, Settings()), "reference_filtered") for x in (t, plain)
    )
    sums = np.array([((ell - r) * mask)[segment == i].sum() for i in range(len(LENGTHS))])
    s, n = quality[: len(LENGTHS)], len(LENGTHS)
    for name, x in (("bound_sft", 1 + sums), ("bound_iw", np.exp(sums))):
        mean = (s * x).sum() / s.sum()
        error = np.sqrt((s**2 * (x - mean) ** 2).sum() * n / (n - 1)) / s.sum()
        assert found[name] == without[name] == pytest.approx(mean, rel=1e-5)
        assert found[f"{name}_se"] == without[f"{name}_se"] == pytest.approx(error, rel=1e-5)
