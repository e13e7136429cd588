"""Selection of episodes, and the objectives on Gaussian policies against the formula in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from megatron_iwsft.config.objective import Proposal
from megatron_iwsft.errors import DataError, DivergenceError
from megatron_iwsft.experiments.control.config import ControlObjective, Training
from megatron_iwsft.experiments.control.policy import GaussianPolicy
from megatron_iwsft.experiments.control.replay import Episode, Replay
from megatron_iwsft.experiments.control.tuning import batch_of, learning_rate, log_probs, tune
from megatron_iwsft.objectives.functions import Level, Normalize, iw_sft
from megatron_iwsft.objectives.loss import micro_batch_loss, sum_names

LENGTHS = [40, 7, 1000, 25, 1, 60]


def policy(seed: int, *, spread: float = 0.5) -> GaussianPolicy:
    generator = torch.Generator().manual_seed(seed)
    made = GaussianPolicy(3, 2, hidden=8, layers=2, generator=generator)
    torch.nn.init.normal_(made.net[-1].weight, std=spread, generator=generator)
    return made


@pytest.fixture
def replay() -> Replay:
    rng = np.random.default_rng(0)
    actor = policy(0)
    episodes = []
    for n in LENGTHS:
        states = rng.normal(size=(n, 3)).astype(np.float32)
        actions = actor.sample(torch.from_numpy(states), torch.Generator().manual_seed(n)).numpy()
        episodes.append(Episode(list(states), list(actions), float(rng.normal())))
    return Replay.of(episodes)


def test_selection_lists_an_episode_once_per_threshold_it_reaches() -> None:
    episodes = [Episode([np.zeros(1)], [np.zeros(1)], float(i)) for i in range(100)]
    replay = Replay.of(episodes)
    assert replay.select([90]).tolist() == list(range(90, 100))
    counts = torch.bincount(replay.select([90, 95, 98]), minlength=100)
    assert counts.tolist() == [0] * 90 + [1] * 5 + [2] * 3 + [3] * 2
    assert len(replay.select([0])) == 100


def test_a_replay_without_episodes_is_rejected() -> None:
    with pytest.raises(DataError, match=r"no episode ended within learner\.replay_steps"):
        Replay.of([])


def test_a_batch_has_all_steps_of_its_episodes(replay: Replay) -> None:
    steps, segment = replay.steps(torch.tensor([3, 1, 3]))
    start = [int(x) for x in replay.starts]
    expected = [*range(start[3], start[4]), *range(start[1], start[2]), *range(start[3], start[4])]
    assert steps.tolist() == expected
    assert segment.tolist() == [0] * 25 + [1] * 7 + [2] * 25


@pytest.mark.parametrize("normalize", ["weights", "sequence_weights"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_loss_and_gradient_match_the_formula(replay: Replay, level: Level, normalize: Normalize, spread: float) -> None:
    """τ = 10, episodes of up to 1,000 steps. With the wide spread some weights are clipped; all must be finite."""
    objective = ControlObjective(name="iw_sft", level=level, normalize=normalize)
    current, proposal, reference = policy(1), policy(0, spread=spread), policy(0)
    episodes = torch.tensor([2, 0, 4, 5, 2])
    batch = batch_of(current, replay, episodes, proposal, log_probs(reference, replay))
    out = micro_batch_loss(iw_sft, batch, objective.settings)
    denominator = out.sums[sum_names(iw_sft).index("denominator")]
    gradients = torch.autograd.grad(out.loss / denominator, list(current.parameters()))

    wide = [copy.deepcopy(p).double() for p in (current, proposal, reference)]
    numerator, total, weights = torch.zeros((), dtype=torch.float64), 0.0, []
    for episode in episodes.tolist():
        at = slice(int(replay.starts[episode]), int(replay.starts[episode + 1]))
        ell, q, r = (p.log_prob(replay.observations[at].double(), replay.actions[at].double()) for p in wide)
        log_ratio = (q - r).detach()
        w = (10.0 * (log_ratio.mean().expand_as(log_ratio) if level == "sequence" else log_ratio)).exp().clamp(0, 1000)
        count = len(w) if normalize == "sequence_weights" else 1
        numerator = numerator - (w * ell).sum() / count
        total += float(w.sum()) / count
        weights += w.tolist()
    expected = torch.autograd.grad(numerator / total, list(wide[0].parameters()))
    assert float(out.loss) / float(denominator) == pytest.approx(float(numerator) / total, rel=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-4
    assert all(np.isfinite(weights))
    if spread > 1:
        assert float(out.sums[sum_names(iw_sft).index("clipped")]) > 0 or min(weights) < 1e-3


def test_iw_sft_equals_sft_until_the_first_proposal_update(replay: Replay) -> None:
    start, settings = policy(1), Training(steps=6, batch_size=4, lr=1e-2)
    everything, reference = torch.arange(len(LENGTHS)), log_probs(start, replay)

    def tuned(objective: ControlObjective) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        out = tune(start, replay, everything, objective, settings, reference=reference, generator=generator)
        return list(out.policy.parameters())

    plain = tuned(ControlObjective(name="sft"))
    late = tuned(ControlObjective(name="iw_sft", proposal=Proposal(kind="ema", update_every=100, decay=0.9)))
    early = tuned(ControlObjective(name="iw_sft", proposal=Proposal(kind="ema", update_every=1, decay=0.5)))
    again = tuned(ControlObjective(name="iw_sft", proposal=Proposal(kind="ema", update_every=1, decay=0.5)))
    for a, b, c, d in zip(plain, late, early, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(c, d)
    assert any(float((a - c).abs().max()) > 1e-4 for a, c in zip(plain, early, strict=True))


def test_cloning_recovers_the_policy_that_produced_the_data(replay: Replay) -> None:
    start, settings = policy(1), Training(steps=300, batch_size=6, lr=1e-2)
    sft, generator = ControlObjective(name="sft"), torch.Generator().manual_seed(0)
    out = tune(start, replay, torch.arange(6), sft, settings, generator=generator)
    truth = log_probs(policy(0), replay).mean()
    assert float(log_probs(start, replay).mean()) < float(truth) - 0.1
    assert float(log_probs(out.policy, replay).mean()) > float(truth) - 0.02


def test_a_loss_that_is_not_finite_stops_training(replay: Replay) -> None:
    start = policy(1)
    torch.nn.init.constant_(start.log_std, float("nan"))
    settings = Training(steps=1, batch_size=2, lr=1e-3)
    with pytest.raises(DivergenceError, match="invalid loss at update 1: nan"):
        tune(start, replay, torch.arange(6), ControlObjective(name="sft"), settings, generator=torch.Generator())


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = Training(steps=100, batch_size=1, lr=2.0, warmup_fraction=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[99] < 0.001
