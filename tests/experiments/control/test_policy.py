"""Gaussian policies: densities against torch.distributions and numerical integration; sampling; the EMA proposal."""

from __future__ import annotations

import math

import torch
from torch.distributions import Independent, Normal

from megatron_iwsft.experiments.control.policy import AveragedPolicy, GaussianPolicy


def policy(actions: int, seed: int = 0, log_std: float = -0.5) -> GaussianPolicy:
    """A policy with means well away from 0, and with normalised observations."""
    generator = torch.Generator().manual_seed(seed)
    made = GaussianPolicy(3, actions, hidden=8, layers=2, generator=generator, log_std=log_std)
    torch.nn.init.normal_(made.net[-1].weight, std=0.7, generator=generator)
    made.shift.copy_(torch.tensor([1.0, -2.0, 0.5]))
    made.scale.copy_(torch.tensor([0.5, 3.0, 1.0]))
    return made


def test_log_prob_and_its_gradient_match_torch_distributions() -> None:
    ours = policy(2).double()
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    actions = 2.0 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    x = (observations - ours.shift) / ours.scale
    expected = Independent(Normal(torch.tanh(ours.net(x)), ours.log_std.exp()), 1).log_prob(actions)
    result = ours.log_prob(observations, actions)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    parameters = list(ours.parameters())
    for a, b in zip(
        torch.autograd.grad(result.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_density_integrates_to_one() -> None:
    ours = policy(2, log_std=-1.0)
    grid = torch.linspace(-4.0, 4.0, 401)
    actions = torch.cartesian_prod(grid, grid)
    observation = torch.tensor([[0.3, 1.0, -1.0]]).expand(len(actions), 3)
    mass = ours.log_prob(observation, actions).double().exp().sum() * (8.0 / 400) ** 2
    assert abs(float(mass) - 1.0) < 1e-5


def test_the_standard_deviation_is_bounded() -> None:
    narrow = policy(1, log_std=-50.0)
    at_mean = narrow.log_prob(torch.zeros(1, 3), narrow.mean(torch.zeros(1, 3)))
    assert math.isclose(float(at_mean), 5.0 - 0.5 * math.log(2 * math.pi), rel_tol=1e-6)


def test_samples_have_the_policys_mean_and_deviation_and_are_reproducible() -> None:
    ours = policy(1)
    observation = torch.tensor([[0.3, 1.0, -1.0]]).expand(40000, 3)
    first, again = (ours.sample(observation, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert abs(float(first.mean() - ours.mean(observation[:1]))) < 0.015
    assert abs(float(first.std()) - math.exp(-0.5)) < 0.015
    assert float(first.max()) > 1.0  # not clipped


def test_the_average_matches_the_ema_formula() -> None:
    followed = policy(1)
    average = AveragedPolicy(followed, decay=0.9, update_every=3)
    expected = [p.detach().double() for p in followed.parameters()]
    for step in range(1, 8):
        with torch.no_grad():
            for p in followed.parameters():
                p.add_(0.1 * step)
        average.after_step(step, followed)
        if step in (3, 6):
            expected = [
                0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, followed.parameters(), strict=True)
            ]
    for p, e in zip(average.average.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-6, atol=1e-6)
        assert not p.requires_grad
