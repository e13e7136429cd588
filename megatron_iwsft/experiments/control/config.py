"""Configuration of a control experiment, with the same strict checks as a training config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_iwsft.config.loader import read_config
from megatron_iwsft.config.objective import Proposal
from megatron_iwsft.config.section import NonNegativeInt, PositiveInt, Section, Share
from megatron_iwsft.objectives.functions import Level, Normalize, Settings

PositiveFloat = Annotated[float, Field(gt=0)]
Percentile = Annotated[float, Field(ge=0, le=100)]


class Run(Section):
    """dir: results directory; seeds: one independent repetition each, including its data; workers: seeds run in parallel."""

    dir: str
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    workers: PositiveInt = 1


class Task(Section):
    """name: a Gymnasium environment with vector observations and actions; episode_steps: overrides its time limit."""

    name: str
    episode_steps: PositiveInt | None = None


class Policy(Section):
    """Network of the mean. hidden: units per layer."""

    hidden: PositiveInt = 64
    layers: PositiveInt = 2


class Learner(Section):
    """PPO. steps: total environment steps; replay_steps: the episodes of the first so many steps are the data.

    environments × horizon: steps per rollout; epochs, batch_size: of the updates on a rollout; trace: GAE's λ.
    """

    steps: PositiveInt
    replay_steps: PositiveInt
    environments: PositiveInt = 8
    horizon: PositiveInt = 256
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 3e-4
    discount: Share = 0.99
    trace: Share = 0.95
    clip: PositiveFloat = 0.2


class Training(Section):
    """Adam with linear warm-up and cosine decay to 0. steps: number of updates; batch_size: episodes per update."""

    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    warmup_fraction: Share = 0.0


class ControlObjective(Section):
    """As in a training config; see objectives/functions.py."""

    name: Literal["sft", "iw_sft"]
    level: Level = "sequence"
    temperature: Annotated[float, Field(ge=0)] = 10.0
    clip: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0, 1000.0], min_length=2, max_length=2)
    normalize: Normalize = "weights"
    proposal: Proposal = Proposal()

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> ControlObjective:
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be [low, high] with low < high; found {self.clip}")
        return self

    @property
    def settings(self) -> Settings:
        return Settings(self.level, self.temperature, (self.clip[0], self.clip[1]), self.normalize)


class Method(Section):
    """percentiles: of the returns; an episode is in the curated data once for each percentile that it reaches."""

    percentiles: Annotated[list[Percentile], Field(min_length=1)]
    objective: ControlObjective


class Evaluation(Section):
    """episodes: number of episodes per policy, with mean actions, from the same initial states for all policies."""

    episodes: PositiveInt


class Experiment(Section):
    """cloning: training of the reference, on all data, from random weights; tuning: training of each method from the reference."""

    run: Run
    task: Task
    policy: Policy = Policy()
    learner: Learner
    cloning: Training
    tuning: Training
    evaluation: Evaluation
    methods: Annotated[dict[str, Method], Field(min_length=1)]


# A smoke run of a few seconds: every part runs, nothing is learned.
QUICK = [
    "run.dir=runs/control-quick",
    "run.seeds=[0, 1]",
    "task.episode_steps=50",
    "learner.steps=2048",
    "learner.replay_steps=1024",
    "learner.horizon=64",
    "learner.epochs=1",
    "cloning.steps=20",
    "tuning.steps=20",
    "evaluation.episodes=2",
]


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Load and check a config file, like `config.loader.load_config`."""
    return read_config(Experiment, path, overrides or [])
