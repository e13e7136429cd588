"""Objectives and metrics against the published formulas in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_iwsft.objectives.functions import (
    LEVELS,
    NORMALIZATIONS,
    OBJECTIVES,
    Level,
    Normalize,
    Objective,
    Origin,
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
    low, high = settings.clip or OBJECTIVES[name].clip_at(settings.level)
    weight = np.zeros_like(ell)
    for i in range(len(LENGTHS)):
        at = (segment == i) & (mask == 1)
        if name == "sft":
            weight[at] = 1
        elif name == "dft":
            weight[at] = np.exp(ell[at])
        elif name == "psft":
            weight[at] = np.exp(ell[at] - r[at]) * (np.exp(ell[at] - r[at]) <= high)
        elif settings.level in ("sequence", "trajectory"):
            log_ratio = (ell[at] - r[at]).mean() if settings.level == "sequence" else (ell[at] - r[at]).sum()
            weight[at] = np.clip(np.exp(settings.temperature * log_ratio), low, high)
        else:
            weight[at] = np.clip(np.exp(settings.temperature * (ell[at] - r[at])), low, high)
    s = quality[segment]
    means = settings.normalize in ("sequences", "sequence_weights")
    share = np.array([*(1 / n for n in LENGTHS), 0])[segment] if means else 1.0
    denominator = {
        "tokens": mask.sum(),
        "weights": (s * weight).sum(),
        "sequences": len(LENGTHS),
        "sequence_weights": (s * share * weight).sum(),
    }[settings.normalize]
    gradient = -s * share * weight / denominator
    loss = (gradient * ell).sum()
    if name == "psft":
        ratio = np.exp(ell - r)
        loss = (-s * share * np.minimum(ratio, np.clip(ratio, low, high)) * mask / denominator).sum()
    return loss, gradient, weight


def metrics_of(objective: Objective, out: LossSums, origin: Origin = "other") -> dict:
    sums = dict(zip(sum_names(objective), out.sums.tolist(), strict=True))
    return summarize(sums | {"weight_max": float(out.weight_max)}, reported_metrics(objective, origin))


CASES = [
    *((name, Settings(normalize=n)) for name in ("sft", "dft") for n in NORMALIZATIONS),
    *(("psft", Settings(clip=(0.8, 1.28), normalize=n)) for n in ("tokens", "sequences")),
] + [
    ("iw_sft", Settings(level=level, temperature=tau, clip=clip, normalize=n))
    for level in LEVELS
    for tau, clip in ((1.0, (0.0, 16.0)), (2.5, (0.5, 1.5)))
    for n in NORMALIZATIONS
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


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_metrics_follow_their_definitions(level: Level, normalize: Normalize) -> None:
    ell, r, mask, segment, _quality = values = data()
    settings = Settings(level=level, temperature=1.0, clip=(0.6, 1.4), normalize=normalize)
    out = micro_batch_loss(iw_sft, trajectories(*values), settings)
    metrics = metrics_of(iw_sft, out)
    _, gradient, weight = published_formula("iw_sft", settings, *values)
    at = mask == 1

    def per_trajectory(x: np.ndarray, of) -> np.ndarray:
        return np.array([of(x[(segment == i) & at]) for i in range(len(LENGTHS))])

    units = weight[at] if level == "token" else per_trajectory(weight, np.mean)
    sums = per_trajectory(ell - r, np.sum)
    raw = np.exp({"token": (ell - r)[at], "sequence": sums / LENGTHS, "trajectory": sums}[level])
    coefficients = gradient[at] if level == "token" else per_trajectory(gradient, np.sum)
    expected = {
        "nll": -ell[at].mean(),
        "weight_mean": units.mean(),
        "weight_ess": coefficients.sum() ** 2 / (len(units) * (coefficients**2).sum()),
        "clip_fraction": ((raw < 0.6) | (raw > 1.4)).mean(),
        "log_ratio": (ell - r)[at].mean(),
        "abs_log_ratio": np.abs(ell - r)[at].mean(),
        "weighted_log_ratio": (weight * (ell - r))[at].sum() / weight[at].sum(),
        "trajectory_log_ratio": sums.mean(),
        "trajectory_log_ratio_std": sums.std(),
        "trained_tokens": at.sum(),
        "sequences": len(LENGTHS),
        "weight_histogram": np.histogram(units, [0, *WEIGHT_BINS, np.inf])[0] / len(units),
        "not_finite_tokens": 0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_trajectories_spread_over_ranks_give_the_same_sums(level: Level, normalize: Normalize) -> None:
    """Every rank runs twice: the first time its parts of the sums over trajectories are recorded, the second it gets their totals."""
    settings = Settings(level, temperature=0.7, clip=(0.3, 3.0), normalize=normalize)
    whole = trajectories(*data())
    expected = micro_batch_loss(iw_sft, whole, settings)

    def of_rank(rank: int, reduce: Callable[[torch.Tensor], object]) -> LossSums:
        held = torch.arange(len(whole.mask)) % 2 == rank
        tokens = {name: getattr(whole, name)[held] for name in ("proposal", "reference", "mask", "segment")}
        part = replace(
            whole,
            **tokens,
            logprobs=whole.logprobs.detach()[held].requires_grad_(),
            segment_sum=local_segment_sum(tokens["segment"], len(whole.lengths), reduce=reduce),
        )
        return micro_batch_loss(iw_sft, part, settings)

    recorded: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        of_rank(rank, lambda values, rank=rank: recorded[rank].append(values.clone()))
    totals = [a + b for a, b in zip(*recorded, strict=True)]
    parts = []
    for rank in range(2):
        left = iter(totals)
        parts.append(of_rank(rank, lambda values, left=left: values.copy_(next(left))))
    assert float(parts[0].loss + parts[1].loss) == pytest.approx(float(expected.loss), rel=1e-6)
    torch.testing.assert_close(parts[0].sums + parts[1].sums, expected.sums, rtol=1e-6, atol=1e-9)


def test_a_trajectory_of_30_000_tokens_is_weighted_by_its_exact_ratio() -> None:
    """Its log-ratios add up to 1.5, in parts of thousands that cancel; others add up to ±9,000."""
    n = 30_000
    rng = np.random.default_rng(0)
    wave = np.float32(0.3) * np.sign(np.sin(np.arange(n) / n * 2 * np.pi)).astype(np.float32)
    ell = np.full(n, -2.0, np.float32)
    exact = (ell + wave + rng.normal(0, 1e-3, n).astype(np.float32)).astype(np.float32)
    exact[0] += np.float32(1.5 - (ell.astype(np.float64) - exact).sum()) * np.float32(-1.0)
    reference = np.concatenate([exact, ell - np.float32(0.3), ell + np.float32(0.3)])
    ell = np.concatenate([ell] * 3)
    segment = torch.arange(3).repeat_interleave(n)
    policy = torch.from_numpy(ell).requires_grad_()
    t = Trajectories(
        logprobs=policy,
        proposal=policy.detach(),
        reference=torch.from_numpy(reference),
        mask=torch.ones(3 * n),
        segment=segment,
        lengths=torch.full((3,), float(n)),
        quality=torch.ones(3),
        segment_sum=local_segment_sum(segment, 3),
    )
    out = micro_batch_loss(iw_sft, t, Settings("trajectory", clip=(0.0, 1e9), normalize="sequence_weights"))
    want = np.exp((ell.astype(np.float64) - reference.astype(np.float64))[:n].sum())
    weight = iw_sft.function(t, Settings("trajectory", clip=(0.0, 1e9))).weight[::n]
    assert weight.tolist() == pytest.approx([want, 1e9, 0.0], rel=1e-6)
    assert torch.isfinite(out.sums).all() and torch.isfinite(out.loss)


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


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("level", LEVELS)
def test_settings_without_a_clip_have_the_default_of_their_level(name: str, level: Level) -> None:
    objective, t = OBJECTIVES[name], trajectories(*data(spread=3.0))
    explicit = Settings(level, clip=objective.clip_at(level))
    found, expected = (micro_batch_loss(objective, t, settings) for settings in (Settings(level), explicit))
    assert torch.equal(found.sums, expected.sums)
    assert torch.equal(objective.function(t, Settings(level)).weight, objective.function(t, explicit).weight)


def test_the_default_clips() -> None:
    assert {level: iw_sft.clip_at(level) for level in LEVELS} == {
        "sequence": (0, 16),
        "trajectory": (0.05, 20),
        "token": (0.2, 1.8),
    }
    assert {OBJECTIVES["psft"].clip_at(level) for level in LEVELS} == {(0.8, 1.28)}
