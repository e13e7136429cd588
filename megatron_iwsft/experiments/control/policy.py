"""Gaussian policies as in the paper's control experiments: a bounded mean and one learned standard deviation per action dimension."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

_LOG_STD_RANGE = (-5.0, 2.0)
_NORMALISED_RANGE = 10.0


def mlp(
    inputs: int, outputs: int, *, hidden: int, layers: int, gain: float, generator: torch.Generator
) -> nn.Sequential:
    """A tanh network with orthogonal initial weights; `gain` applies to the output layer."""
    widths = [inputs, *[hidden] * layers]
    modules: list[nn.Module] = []
    for width, following in zip(widths, [*widths[1:], outputs], strict=True):
        linear = nn.Linear(width, following)
        is_last = len(modules) == 2 * layers
        nn.init.orthogonal_(linear.weight, gain if is_last else math.sqrt(2.0), generator=generator)
        nn.init.zeros_(linear.bias)
        modules += [linear] if is_last else [linear, nn.Tanh()]
    return nn.Sequential(*modules)


class GaussianPolicy(nn.Module):
    """π(a|s) = N(tanh(f(s)), diag(σ²)), with σ independent of the state.

    Densities are of the sampled action, before the environment clips it to [−1, 1]. Observations are shifted and scaled by the
    buffers `shift` and `scale`, which the training code sets.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        observations: int,
        actions: int,
        *,
        hidden: int,
        layers: int,
        generator: torch.Generator,
        log_std: float = -0.5,
    ) -> None:
        super().__init__()
        self.net = mlp(observations, actions, hidden=hidden, layers=layers, gain=0.01, generator=generator)
        self.log_std = nn.Parameter(torch.full((actions,), log_std))
        self.register_buffer("shift", torch.zeros(observations))
        self.register_buffer("scale", torch.ones(observations))

    def normalise(self, observations: Tensor) -> Tensor:
        return ((observations - self.shift) / self.scale).clamp(-_NORMALISED_RANGE, _NORMALISED_RANGE)

    def mean(self, observations: Tensor) -> Tensor:
        """[T, O] → [T, A], in (−1, 1)."""
        return torch.tanh(self.net(self.normalise(observations)))

    @property
    def bounded_log_std(self) -> Tensor:
        return self.log_std.clamp(*_LOG_STD_RANGE)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[T, O], [T, A] → [T]: log-density in nats, summed over action dimensions."""
        log_std = self.bounded_log_std
        z = (actions - self.mean(observations)) * torch.exp(-log_std)
        return (-0.5 * z * z - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    @torch.no_grad()
    def sample(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Sample actions: [T, O] → [T, A], not clipped."""
        mean = self.mean(observations)
        return mean + self.bounded_log_std.exp() * torch.randn(mean.shape, generator=generator)


class AveragedPolicy:
    """The EMA proposal: q ← decay·q + (1 − decay)·π on the parameters, every `update_every` steps."""

    def __init__(self, policy: GaussianPolicy, *, decay: float, update_every: int) -> None:
        self.average = copy.deepcopy(policy).requires_grad_(False)
        self.decay = decay
        self.update_every = update_every

    @torch.no_grad()
    def after_step(self, step: int, policy: GaussianPolicy) -> None:
        """Update the average. step: number of updates of `policy` so far."""
        if step % self.update_every == 0:
            for mean, value in zip(self.average.parameters(), policy.parameters(), strict=True):
                mean.lerp_(value, 1.0 - self.decay)
