"""The configuration of a control experiment, checked as a training run's is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_iwsft.config.loader import read_config
from megatron_iwsft.config.schema import Proposal
from megatron_iwsft.config.section import NonNegativeInt, PositiveInt, Section, Share
from megatron_iwsft.objectives.functions import Settings

PositiveFloat = Annotated[float, Field(gt=0)]
Percentile = Annotated[float, Field(ge=0, le=100)]


class Run(Section):
    """dir: of the results; seeds: one independent repetition each, its data included; workers: how many run at a time."""

    dir: str
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    workers: PositiveInt = 1


class Task(Section):
    """name: a Gymnasium environment with vectors as observations and actions; episode_steps: a time limit other than its own."""

    name: str
    episode_steps: PositiveInt | None = None


class Policy(Section):
    """The mean's network. hidden: units of a layer."""

    hidden: PositiveInt = 64
    layers: PositiveInt = 2


class Learner(Section):
    """PPO. steps: of the environment, over all of training; replay_steps: how many of them, from the first, are kept as data.

    environments × horizon steps are played between updates; epochs and batch_size: of the updates; trace: GAE's λ.
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
    """Adam with linear warm-up and a cosine to 0. steps: updates; batch_size: episodes in each."""

    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    warmup_fraction: Share = 0.0


class Objective(Section):
    """As in a training run's config; see objectives.py."""

    name: Literal["sft", "iw_sft"]
    level: Literal["sequence", "token"] = "sequence"
    temperature: Annotated[float, Field(ge=0)] = 10.0
    clip: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0, 1000.0], min_length=2, max_length=2)
    normalize: Literal["tokens", "weights", "sequences"] = "weights"
    proposal: Proposal = Proposal()

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> Objective:
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be [low, high] with low < high; found {self.clip}")
        return self

    @property
    def settings(self) -> Settings:
        return Settings(self.level, self.temperature, (self.clip[0], self.clip[1]), self.normalize)


class Method(Section):
    """percentiles: of the returns; an episode is in the curated data once for every one that it reaches."""

    percentiles: Annotated[list[Percentile], Field(min_length=1)]
    objective: Objective


class Evaluation(Section):
    """episodes: played by every policy, acting by its mean, from the same first states."""

    episodes: PositiveInt


class Experiment(Section):
    """cloning: of all the data, from random weights: the reference. tuning: of the reference, by each of the methods."""

    run: Run
    task: Task
    policy: Policy = Policy()
    learner: Learner
    cloning: Training
    tuning: Training
    evaluation: Evaluation
    methods: Annotated[dict[str, Method], Field(min_length=1)]


# A smoke run of seconds: every part runs, nothing is learned.
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
    """As `config_file.load_config`."""
    return read_config(Experiment, path, overrides or [])
