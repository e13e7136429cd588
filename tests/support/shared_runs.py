"""Training runs that several tests share, trained when a test first asks for one. A run that fails fails its own tests only."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_iwsft.checkpoint.info import CheckpointInfo, step_of
from megatron_iwsft.checkpoint.tensors import CheckpointTensors
from megatron_iwsft.config.schema import Config
from megatron_iwsft.testing import run_distributed
from tests.support.jobs import result, run_each


class SharedRuns:
    """Runs of `world_size` processes by name, each in a subdirectory of `directory`.

    prepare  returns a run's config; it may call this object for another run that this one starts from
    groups   runs that are trained in one job, which saves the start of the others; a run in no group has a job of its own

    The error of a failed run is raised for every test that asks for it. The rest of its group is trained in a new job.
    """

    def __init__(
        self,
        directory: Path,
        prepare: Callable[[SharedRuns, str], Config],
        groups: Sequence[Sequence[str]] = (),
        *,
        world_size: int = 2,
    ) -> None:
        self.directory, self._world_size = directory, world_size
        self._prepare, self._groups = prepare, groups
        self._outcomes: dict[str, Any | Exception] = {}

    def __call__(self, name: str) -> Path:
        """The directory of run `name`, which is trained now if it has not been."""
        if name not in self._outcomes:
            self._train(next((group for group in self._groups if name in group), [name]))
        result(self._outcomes, name)
        return self.directory / name

    def _train(self, names: Sequence[str]) -> None:
        configs = {}
        for name in names:
            try:
                configs[name] = (self._prepare(self, name),)
            except Exception as error:  # a config that is wrong, or a failed run that this one starts from
                self._outcomes[name] = error
        self._outcomes |= run_each(train_job, self._world_size, configs)


def train_job(platform, settings: Config) -> None:
    """Train, in a job of processes."""
    from megatron_iwsft.train.trainer import train

    train(settings)


def train_on(world_size: int, settings: Config) -> None:
    """Train in a job of `world_size` processes."""
    run_distributed(train_job, world_size, settings)


def copy_without_checkpoints_after(step: int, source: Path, target: Path) -> None:
    """Copy a run as if it had been interrupted after it saved `step`."""
    shutil.copytree(source, target)
    for directory in (target / "checkpoints").glob("step-*"):
        if step_of(directory) > step:
            shutil.rmtree(directory)


def assert_same_checkpoints(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs hold the same step, weights and optimizer states, bit for bit."""
    infos = [CheckpointInfo.read(run) for run in (a, b)]
    assert infos[0].step == infos[1].step
    stored = FileSystemReader(str(infos[0].directory)).read_metadata().state_dict_metadata
    names = [name for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)]
    assert any(".exp_avg_sq." in name for name in names)
    first, second = (CheckpointTensors(info.directory) for info in infos)
    assert [name for name in names if not torch.equal(first.read(name), second.read(name))] == []
