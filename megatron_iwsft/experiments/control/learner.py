"""Where the data come from: a policy in training, by proximal policy optimisation, and every episode that it played.

PPO (arXiv 1707.06347) with generalised advantage estimation (1506.02438), observations and rewards scaled by running
statistics. On-policy, since the replay is then what Gaussian policies of the class that is fitted to it have done.
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
    """Mean and variance of everything seen, merged batch by batch (Chan, Golub and LeVeque). Columns are kept apart."""

    def __init__(self, columns: int) -> None:
        self.count = 0.0
        self.mean = torch.zeros(columns, dtype=torch.float64)
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """[N, columns]"""
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
    """N steps of each of E environments.

    observations [N, E, O]; actions [N, E, A]; rewards [N, E]; ends [N, E] 1 where an episode ended, of itself or by a time limit;
    cut_off: (step, environment, state) of every time limit; following [E, O]: where the last step led.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    cut_off: list[tuple[int, int, np.ndarray]]
    ends: Tensor
    following: Tensor


class Player:
    """E environments in step, and the episodes that came to their end in them."""

    def __init__(self, task: Task, environments: int, seed: int) -> None:
        self.episodes: list[Episode] = []
        self._environments = [make_environment(task) for _ in range(environments)]
        self._current = [Episode() for _ in range(environments)]
        self._states = [self._begin(i, seed=seed * environments + i) for i in range(environments)]

    def _begin(self, i: int, seed: int | None = None) -> np.ndarray:
        return np.asarray(self._environments[i].reset(seed=seed)[0], dtype=np.float32)

    def play(self, policy: GaussianPolicy, steps: int, generator: torch.Generator) -> Rollout:
        """Episodes run on from one call to the next."""
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
    """Generalised advantage estimates [N, E]. values [N, E] of the states acted in, last [E] of where the last step led.

    A time limit's bootstrap is part of the reward it came with; nothing flows back across an end.
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
    """Rewards divided by the running deviation of their discounted sum, so that values are of order one."""

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
    """replay: the episodes of the first `learner.replay_steps` steps; policy: what training ended with."""

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
        # Only between iterations: within one, the policy that is improved must be the one that acted.
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
    """Some epochs of PPO's clipped objective on one rollout."""
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
