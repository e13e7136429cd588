"""Objectives and metrics against the published formulas in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_iwsft.objectives.functions import (
    OBJECTIVES,
    Objective,
    Settings,
    Trajectories,
    iw_sft,
    local_segment_sum,
)
from megatron_iwsft.objectives.loss import LossSums, micro_batch_loss, reported_metrics, sum_names
from megatron_iwsft.objectives.metrics import WEIGHT_BINS, summarize

pytestmark = pytest.mark.numerics

LENGTHS = [5, 1, 9, 3]


def data(seed: int = 0, spread: float = 1.0):
    """(log-probs, reference, mask, segment, quality) of four trajectories, with untrained positions between and after them."""
    rng = np.random.default_rng(seed)
    ell, r, mask, segment = [], [], [], []
    for i, n in enumerate(LENGTHS):
        keep = np.ones(n + 2)
        keep[:2] = 0  # a prompt
        ell += list(-rng.exponential(2.0, n + 2) * keep)
        r += list((np.array(ell[-n - 2 :]) + spread * rng.normal(0.3 * i - 0.5, 0.5, n + 2)) * keep)
        mask += list(keep)
        segment += [i] * (n + 2)
    mask += [0] * 3  # filler, a segment of its own
    ell += [0.0] * 3
    r += [0.0] * 3
    segment += [len(LENGTHS)] * 3
    return np.array(ell), np.array(r), np.array(mask), np.array(segment), np.array([0.5, 2.0, 1.0, 0.25, 0.0])


def trajectories(ell, r, mask, segment, quality) -> Trajectories:
    logprobs = torch.tensor(ell, dtype=torch.float32, requires_grad=True)
    segment = torch.from_numpy(segment)
    lengths = torch.tensor([*LENGTHS, 0], dtype=torch.float32)
    return Trajectories(
        logprobs=logprobs,
        proposal=logprobs.detach(),
        reference=torch.tensor(r, dtype=torch.float32),
        mask=torch.tensor(mask, dtype=torch.float32),
        segment=segment,
        lengths=lengths,
        quality=torch.tensor(quality, dtype=torch.float32),
        segment_sum=local_segment_sum(segment, len(lengths)),
    )


def published_formula(name, settings: Settings, ell, r, mask, segment, quality):
    """(L, dL/dℓ, per-token weights) as published: L = −(1/N) Σ_i s_i Σ_t w_t ℓ_t, for psft −min(ρ, clip ρ) in place of −w_t ℓ_t."""
    low, high = settings.clip
    weight = np.zeros_like(ell)
    for i in range(len(LENGTHS)):
        at = (segment == i) & (mask == 1)
        if name == "sft":
            weight[at] = 1
        elif name == "dft":
            weight[at] = np.exp(ell[at])
        elif name == "psft":
            weight[at] = np.exp(ell[at] - r[at]) * (np.exp(ell[at] - r[at]) <= high)
        elif settings.level == "sequence":
            weight[at] = np.clip(np.exp(settings.temperature * (ell[at] - r[at]).mean()), low, high)
        else:
            weight[at] = np.clip(np.exp(settings.temperature * (ell[at] - r[at])), low, high)
    s = quality[segment]
    share = np.array([*(1 / n for n in LENGTHS), 0])[segment] if settings.normalize == "sequences" else 1.0
    denominator = {"tokens": mask.sum(), "weights": (s * weight).sum(), "sequences": len(LENGTHS)}[settings.normalize]
    gradient = -s * share * weight / denominator
    loss = (gradient * ell).sum()
    if name == "psft":
        ratio = np.exp(ell - r)
        loss = (-s * share * np.minimum(ratio, np.clip(ratio, low, high)) * mask / denominator).sum()
    return loss, gradient, weight


def metrics_of(objective: Objective, out: LossSums) -> dict:
    sums = dict(zip(sum_names(objective), out.sums.tolist(), strict=True))
    return summarize(sums | {"weight_max": float(out.weight_max)}, reported_metrics(objective))


CASES = [
    *((name, Settings(normalize=n)) for name in ("sft", "dft") for n in ("tokens", "weights", "sequences")),
    *(("psft", Settings(clip=(0.8, 1.28), normalize=n)) for n in ("tokens", "sequences")),
] + [
    ("iw_sft", Settings(level=level, temperature=tau, clip=clip, normalize=n))
    for level in ("sequence", "token")
    for tau, clip in ((1.0, (0.0, 16.0)), (2.5, (0.5, 1.5)))
    for n in ("tokens", "weights", "sequences")
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_loss_and_gradient_follow_the_formula(name: str, settings: Settings) -> None:
    values = data()
    t = trajectories(*values)
    out = micro_batch_loss(OBJECTIVES[name], t, settings)
    denominator = out.sums[sum_names(OBJECTIVES[name]).index("denominator")]
    (out.loss / denominator).backward()
    loss, gradient, weight = published_formula(name, settings, *values)
    assert out.loss.item() / denominator.item() == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(t.logprobs.grad.double().numpy(), gradient, rtol=1e-6, atol=1e-9)
    assert out.weight_max.item() == pytest.approx(weight.max(), rel=1e-6)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_metrics_follow_their_definitions(level: str) -> None:
    ell, r, mask, segment, _quality = values = data()
    settings = Settings(level=level, temperature=1.0, clip=(0.6, 1.4))
    out = micro_batch_loss(iw_sft, trajectories(*values), settings)
    metrics = metrics_of(iw_sft, out)
    _, _, weight = published_formula("iw_sft", settings, *values)
    at = mask == 1
    units = weight[at] if level == "token" else np.array([weight[(segment == i) & at][0] for i in range(len(LENGTHS))])
    means = np.array([(ell - r)[(segment == i) & at].mean() for i in range(len(LENGTHS))])
    raw = np.exp((ell - r)[at] if level == "token" else means)
    per_trajectory = np.array([weight[(segment == i) & at].mean() for i in range(len(LENGTHS))])
    expected = {
        "nll": -ell[at].mean(),
        "weight_mean": units.mean(),
        "weight_ess": units.sum() ** 2 / (len(units) * (units**2).sum()),
        "clip_fraction": ((raw < 0.6) | (raw > 1.4)).mean(),
        "log_ratio": (ell - r)[at].mean(),
        "abs_log_ratio": np.abs(ell - r)[at].mean(),
        "kl_to_reference": (weight * (ell - r))[at].sum() / weight[at].sum(),
        "bound_sft": (1 + means).mean(),
        "bound_iw": per_trajectory.mean(),  # with the policy as proposal, log p/q is 0
        "trained_tokens": at.sum(),
        "sequences": len(LENGTHS),
        "bound_gap": per_trajectory.mean() - (1 + means).mean(),
        "weight_histogram": np.histogram(units, [0, *WEIGHT_BINS, np.inf])[0] / len(units),
        "not_finite_tokens": 0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_the_iw_sft_bound_is_tighter_and_equal_at_the_reference() -> None:
    """Since 1 + log x ≤ x. Both are equal where the policy is the reference."""
    settings = Settings(clip=(0.0, 1e9))
    apart = micro_batch_loss(iw_sft, trajectories(*data()), settings)
    metrics = metrics_of(iw_sft, apart)
    assert metrics["bound_iw"] > metrics["bound_sft"]
    ell, _, mask, segment, quality = data()
    same = micro_batch_loss(iw_sft, trajectories(ell, ell, mask, segment, quality), settings)
    metrics = metrics_of(iw_sft, same)
    assert metrics["bound_iw"] == pytest.approx(metrics["bound_sft"], abs=1e-7)
    assert metrics["weight_max"] == metrics["weight_mean"] == 1.0


def test_enormous_ratios_stay_finite() -> None:
    out = micro_batch_loss(iw_sft, trajectories(*data(spread=-500.0)), Settings(level="token", clip=(0.2, 1.8)))
    assert torch.isfinite(out.sums).all()
    assert torch.isfinite(out.loss)


def test_infinite_ratios_are_clipped_and_counted() -> None:
    ell, r, mask, segment, quality = data()
    trained = np.flatnonzero(mask)
    r[trained[0]], r[trained[7]] = -np.inf, np.nan  # the reference gave a token no probability; a damaged value
    values = (ell, r, mask, segment, quality)
    for settings in (Settings(clip=(0.0, 16.0)), Settings(level="token", clip=(0.2, 1.8))):
        t = trajectories(*values)
        out = micro_batch_loss(iw_sft, t, settings)
        out.loss.backward()
        assert torch.isfinite(out.loss) and torch.isfinite(t.logprobs.grad).all() and torch.isfinite(out.sums).all()
        metrics = metrics_of(iw_sft, out)
        assert metrics["not_finite_tokens"] == 2
        assert metrics["weight_max"] == pytest.approx(settings.clip[1])
    token = iw_sft.function(trajectories(*values), Settings(level="token", clip=(0.2, 1.8)))
    assert token.weight[trained[0]] == pytest.approx(1.8) and token.weight[trained[7]] == 1.0
