"""Weights of turns multiply the loss of their tokens, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_iwsft.objectives.functions import OBJECTIVES, Settings
from megatron_iwsft.objectives.loss import micro_batch_loss, sum_names
from tests.objectives.test_objectives import data, trajectories

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
