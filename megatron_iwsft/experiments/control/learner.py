"""Produce the data: train a policy with proximal policy optimisation and record every episode that it plays.

PPO (arXiv 1707.06347) with generalised advantage estimation (arXiv 1506.02438); observations and rewards are scaled by running
statistics. The learner is on-policy, so the replay comes from Gaussian policies of the same class as those trained on it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_iwsft.experiments.control.config import Learner, Task
from megatron_iwsft.experiments.control.environment import make_environment, sizes
from megatron_iwsft.experiments.control.policy import GaussianPolicy, mlp
from megatron_iwsft.experiments.control.replay import Episode, Replay


class RunningMoments:
    """Running mean and variance per column, merged batch by batch (Chan, Golub and LeVeque)."""

    def __init__(self, columns: int) -> None:
        self.count = 0.0
        self.mean = torch.zeros(columns, dtype=torch.float64)
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add values [N, columns]."""
        values = values.double()
        total = self.count + len(values)
        shift = values.mean(0) - self.mean
        self.squares += (values - values.mean(0)).square().sum(0) + shift.square() * self.count * len(values) / total
        self.mean += shift * len(values) / total
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / max(self.count, 1.0)).sqrt().clamp(min=1e-4)


@dataclass
class Rollout:
    """N steps in each of E environments.

    observations [N, E, O]; actions [N, E, A]; rewards [N, E]; ends [N, E]: 1 where an episode terminated or was truncated;
    cut_off: (step, environment, final state) of every truncated episode; following [E, O]: observations after the last step.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    cut_off: list[tuple[int, int, np.ndarray]]
    ends: Tensor
    following: Tensor


class Player:
    """Steps E environments in parallel and collects the finished episodes."""

    def __init__(self, task: Task, environments: int, seed: int) -> None:
        self.episodes: list[Episode] = []
        self._environments = [make_environment(task) for _ in range(environments)]
        self._current = [Episode() for _ in range(environments)]
        self._states = [self._begin(i, seed=seed * environments + i) for i in range(environments)]

    def _begin(self, i: int, seed: int | None = None) -> np.ndarray:
        return np.asarray(self._environments[i].reset(seed=seed)[0], dtype=np.float32)

    def play(self, policy: GaussianPolicy, steps: int, generator: torch.Generator) -> Rollout:
        """Play `steps` steps in every environment. Unfinished episodes continue in the next call."""
        observations, actions, cut_off = [], [], []
        rewards, ends = torch.zeros(2, steps, len(self._environments))
        for n in range(steps):
            observations.append(torch.from_numpy(np.stack(self._states)))
            actions.append(policy.sample(observations[-1], generator))
            for i, action in enumerate(actions[-1].numpy()):
                following, reward, terminated, truncated, _ = self._environments[i].step(action)
                episode = self._current[i]
                episode.observations.append(self._states[i])
                episode.actions.append(action)
                episode.total += float(reward)
                rewards[n, i] = float(reward)
                self._states[i] = np.asarray(following, dtype=np.float32)
                if terminated or truncated:
                    ends[n, i] = 1.0
                    if not terminated:
                        cut_off.append((n, i, self._states[i]))
                    self.episodes.append(episode)
                    self._current[i] = Episode()
                    self._states[i] = self._begin(i)
        last = torch.from_numpy(np.stack(self._states))
        return Rollout(torch.stack(observations), torch.stack(actions), rewards, cut_off, ends, last)


def advantages(rewards: Tensor, values: Tensor, last: Tensor, ends: Tensor, *, discount: float, trace: float) -> Tensor:
    """Generalised advantage estimates [N, E]. values [N, E]: of the observed states; last [E]: of the states after the last step.

    The bootstrap value of a truncated episode must already be added to its last reward; nothing propagates across an end.
    """
    out = torch.zeros_like(rewards)
    advantage = torch.zeros_like(last)
    following = last
    for n in reversed(range(len(rewards))):
        alive = 1.0 - ends[n]
        error = rewards[n] + discount * following * alive - values[n]
        advantage = error + discount * trace * alive * advantage
        out[n] = advantage
        following = values[n]
    return out


class _RewardScale:
    """Divides rewards by the running standard deviation of their discounted sum, so that values are of order one."""

    def __init__(self, environments: int, discount: float) -> None:
        self._moments = RunningMoments(1)
        self._sum = torch.zeros(environments)
        self._discount = discount

    def __call__(self, rewards: Tensor, ends: Tensor) -> Tensor:
        sums = []
        for reward, end in zip(rewards, ends, strict=True):
            self._sum = self._sum * self._discount + reward
            sums.append(self._sum)
            self._sum = self._sum * (1.0 - end)
        self._moments.update(torch.cat(sums)[:, None])
        return rewards / self._moments.std.float()


@dataclass(frozen=True)
class Learned:
    """replay: the episodes of the first `learner.replay_steps` steps; policy: the final policy."""

    replay: Replay
    policy: GaussianPolicy


def learn(task: Task, settings: Learner, *, hidden: int, layers: int, seed: int) -> Learned:
    """Train a policy for `settings.steps` steps of the task. The same seed gives the same replay."""
    generator = torch.Generator().manual_seed(seed)
    observations, actions = sizes(task)
    policy = GaussianPolicy(observations, actions, hidden=hidden, layers=layers, generator=generator)
    value = mlp(observations, 1, hidden=hidden, layers=layers, gain=1.0, generator=generator)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=settings.lr, eps=1e-5)
    player = Player(task, settings.environments, seed)
    moments = RunningMoments(observations)
    scale = _RewardScale(settings.environments, settings.discount)
    iterations = max(1, settings.steps // (settings.environments * settings.horizon))
    kept = 0
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1.0 - iteration / iterations)
        rollout = player.play(policy, settings.horizon, generator)
        if (iteration + 1) * settings.environments * settings.horizon <= settings.replay_steps:
            kept = len(player.episodes)
        _improve(policy, value, optimizer, rollout, scale(rollout.rewards, rollout.ends), settings, generator)
        # Update the normalisation between iterations only: PPO's ratio must start at 1 for the policy that acted.
        moments.update(rollout.observations.flatten(0, 1))
        policy.shift.copy_(moments.mean)
        policy.scale.copy_(moments.std)
    return Learned(Replay.of(player.episodes[:kept]), policy)


def _improve(
    policy: GaussianPolicy,
    value: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    rewards: Tensor,
    settings: Learner,
    generator: torch.Generator,
) -> None:
    """Run `settings.epochs` epochs of PPO's clipped objective on one rollout."""
    parameters = list(itertools.chain(policy.parameters(), value.parameters()))

    def values_of(observations: Tensor) -> Tensor:
        return value(policy.normalise(observations)).squeeze(-1)

    with torch.no_grad():
        rewards = rewards.clone()
        for n, i, state in rollout.cut_off:
            rewards[n, i] += settings.discount * values_of(torch.from_numpy(state)[None])[0]
        values = values_of(rollout.observations)
        last = values_of(rollout.following)
        gain = advantages(rewards, values, last, rollout.ends, discount=settings.discount, trace=settings.trace)
        target = (gain + values).flatten()
        gain = gain.flatten()
        states, actions = rollout.observations.flatten(0, 1), rollout.actions.flatten(0, 1)
        before = policy.log_prob(states, actions)

    for _ in range(settings.epochs):
        for batch in torch.randperm(len(states), generator=generator).split(settings.batch_size):
            ratio = torch.exp(policy.log_prob(states[batch], actions[batch]) - before[batch])
            advantage = (gain[batch] - gain[batch].mean()) / (gain[batch].std() + 1e-8)
            clipped = ratio.clamp(1.0 - settings.clip, 1.0 + settings.clip)
            policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
            value_loss = (values_of(states[batch]) - target[batch]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
