"""The PPO learner: its parts against their definitions, and the recorded episodes against a replay of their actions."""

from __future__ import annotations

import numpy as np
import torch

from megatron_iwsft.experiments.control.config import Learner, Task
from megatron_iwsft.experiments.control.environment import evaluate, make_environment, mean_action, random_action
from megatron_iwsft.experiments.control.learner import RunningMoments, advantages, learn

TASK = Task(name="InvertedPendulum-v5", episode_steps=200)


def test_advantages_are_discounted_sums_of_td_errors_within_an_episode() -> None:
    rng = np.random.default_rng(0)
    n, discount, trace = 12, 0.9, 0.7
    rewards, values, last = rng.normal(size=(n, 1)), rng.normal(size=(n, 1)), rng.normal(size=1)
    ends = np.zeros((n, 1))
    ends[[4, 9]] = 1
    expected = np.zeros(n)
    for start in range(n):
        factor = 1.0
        for t in range(start, n):
            following = 0.0 if ends[t, 0] else (values[t + 1, 0] if t + 1 < n else last[0])
            expected[start] += factor * (rewards[t, 0] + discount * following - values[t, 0])
            if ends[t, 0]:
                break
            factor *= discount * trace
    tensors = (torch.from_numpy(x) for x in (rewards, values, last, ends))
    result = advantages(*tensors, discount=discount, trace=trace)
    np.testing.assert_allclose(result[:, 0].numpy(), expected, rtol=1e-12)


def test_running_moments_equal_those_of_all_values() -> None:
    values = np.random.default_rng(0).normal(5.0, 3.0, (100, 2))
    moments = RunningMoments(2)
    for part in np.split(values, [10, 11, 60]):
        moments.update(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std.numpy(), values.std(0), rtol=1e-12)


def test_replaying_recorded_actions_gives_the_recorded_states_and_returns() -> None:
    settings = Learner(steps=512, replay_steps=512, environments=1, horizon=256, epochs=1)
    replay = learn(TASK, settings, hidden=8, layers=1, seed=3).replay
    environment = make_environment(TASK)
    state, _ = environment.reset(seed=3)
    for episode in range(3):
        total = 0.0
        for step in range(int(replay.starts[episode]), int(replay.starts[episode + 1])):
            np.testing.assert_array_equal(np.asarray(state, dtype=np.float32), replay.observations[step].numpy())
            state, reward, *_ = environment.step(replay.actions[step].numpy())
            total += float(reward)
        assert total == float(replay.returns[episode])
        state, _ = environment.reset()


def test_the_learner_improves_and_is_reproducible() -> None:
    settings = Learner(steps=8192, replay_steps=4096, environments=4, horizon=256, lr=1e-3)
    learned = learn(TASK, settings, hidden=32, layers=2, seed=0)
    random = evaluate(random_action(TASK, 0), TASK, episodes=5, seed=100)
    assert evaluate(mean_action(learned.policy), TASK, episodes=5, seed=100) > 5 * random
    steps = len(learned.replay.observations)
    assert 0.8 * 4096 < steps <= 4096
    assert int(learned.replay.starts[-1]) == steps

    short = settings.model_copy(update={"steps": 1024, "replay_steps": 1024})
    first, again, other = (learn(TASK, short, hidden=8, layers=1, seed=seed).replay for seed in (5, 5, 6))
    assert torch.equal(first.actions, again.actions) and torch.equal(first.returns, again.returns)
    assert not torch.equal(first.actions[:10], other.actions[:10])
