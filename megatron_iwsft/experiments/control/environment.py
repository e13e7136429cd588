"""Create Gymnasium environments, and evaluate policies in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.experiments.control.config import Task
from megatron_iwsft.experiments.control.policy import GaussianPolicy

if TYPE_CHECKING:
    import gymnasium

# Observations [E, O] → actions [E, A].
Actor = Callable[[torch.Tensor], torch.Tensor]


def make_environment(task: Task) -> gymnasium.Env:
    """One environment with actions clipped to [−1, 1]. Raises ConfigError if it is not installed, unknown or not continuous."""
    try:
        import gymnasium
        import mujoco
    except ImportError as error:
        raise ConfigError(
            f"the control experiments need the package {error.name!r}: pip install -e '.[control]' in the checkout."
        ) from None
    # Gymnasium's own task files use deprecated attributes; MuJoCo would print a warning for every environment.
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        environment = gymnasium.make(task.name, max_episode_steps=task.episode_steps)
    except gymnasium.error.Error as error:
        raise ConfigError(
            f"task.name: Gymnasium has no environment {task.name!r} ({error}). "
            "Choose another task.name, or install the environment."
        ) from None
    finally:
        mujoco.set_mju_user_warning(None)
    observation, action = environment.observation_space, environment.action_space
    for space in (observation, action):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            environment.close()
            raise ConfigError(f"task.name: {task.name!r} has the space {space}; expected a vector of real numbers.")
    assert isinstance(action, gymnasium.spaces.Box)
    centre, half = (action.high + action.low) / 2, (action.high - action.low) / 2
    return gymnasium.wrappers.TransformAction(
        environment, lambda a: centre + half * np.clip(a, -1.0, 1.0), action_space=action
    )


def sizes(task: Task) -> tuple[int, int]:
    """Dimensions of the observation and of the action."""
    environment = make_environment(task)
    assert environment.observation_space.shape and environment.action_space.shape
    return environment.observation_space.shape[0], environment.action_space.shape[0]


def mean_action(policy: GaussianPolicy) -> Actor:
    return policy.mean


def random_action(task: Task, seed: int) -> Actor:
    """Actions sampled uniformly from [−1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    _, actions = sizes(task)
    return lambda observations: 2.0 * torch.rand(len(observations), actions, generator=generator) - 1.0


@torch.no_grad()
def evaluate(actor: Actor, task: Task, *, episodes: int, seed: int) -> float:
    """Mean undiscounted return of the episodes, stepped in parallel. Episode i starts from seed + i for every actor."""
    environments = [make_environment(task) for _ in range(episodes)]
    states = [np.asarray(e.reset(seed=seed + i)[0], dtype=np.float32) for i, e in enumerate(environments)]
    returns = np.zeros(episodes)
    running = list(range(episodes))
    while running:
        actions = actor(torch.from_numpy(np.stack([states[i] for i in running]))).numpy()
        still = []
        for i, action in zip(running, actions, strict=True):
            state, reward, terminated, truncated, _ = environments[i].step(action)
            states[i] = np.asarray(state, dtype=np.float32)
            returns[i] += float(reward)
            if not (terminated or truncated):
                still.append(i)
        running = still
    return float(returns.mean())
