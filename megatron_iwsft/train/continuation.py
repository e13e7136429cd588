"""Where a run continues: its newest checkpoint that is whole, from the same data, config and corpus."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_iwsft.checkpoint import info as checkpoint
from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.config.schema import Config, Section
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.train.setup import Job

# What may differ between a run and its continuation; anything else would make it another run.
_MAY_CHANGE = {
    "run": {"name", "dir", "device", "hang_timeout_s", "max_bad_steps", "spike"},
    "data": {"corpus", "micro_batch_size", "epochs", "max_steps"},
}
_MUST_STAY = ("model", "data", "objective", "reference", "precision", "run")
_OF_NO_EFFECT = {"run.name", "run.dir"}
_OF_THE_RATE = {
    "data.epochs",
    "data.max_steps",
    *(f"optimizer.{k}" for k in ("lr", "min_lr", "schedule", "warmup_fraction")),
}
# A killed run's lock goes with the last of its processes.
_LOCK_PATIENCE_S = 15.0


def resume(
    job: Job,
    load: Callable[[CheckpointInfo], None],
    say: Callable[[str], None],
    *,
    before: int | None = None,
) -> CheckpointInfo | None:
    """Load the newest checkpoint of this run that can be loaded, of step `before` at the latest; None if there is none.

    Collective over all ranks. Raises CheckpointError if there are some but none is whole, ConfigError if the run was another.
    """
    root = job.run_directory / "checkpoints"
    found = [d for d in checkpoint.complete_checkpoints(root) if before is None or _step(d) <= before]
    if found and job.config.checkpoint.resume == "never" and before is None:
        raise ConfigError(
            f"checkpoint.resume is never, but {root} holds checkpoints. Choose another run.dir, or remove them."
        )
    for directory in found:
        problem = ""
        try:
            info = CheckpointInfo.read(directory)
            _check_same_run(job, info)
            load(info)
        except CheckpointError as error:
            problem = str(error)
        # Every rank must take the same checkpoint, also where only one of them met the damage.
        problems: list[str] = [""] * job.platform.world_size
        dist.all_gather_object(problems, problem)
        if not any(problems):
            return info
        say(f"skipping a checkpoint: {next(filter(None, problems))}")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {root} can be loaded. Move them away to start afresh."
        )
    return None


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def changes(config: Config, earlier: dict[str, Any]) -> str:
    """What `config` has differently from the one that a checkpoint was saved with, for the log; empty if nothing."""
    found = {".".join(path): (value, before) for path, value, before in _differences(config, earlier)}
    text = ", ".join(
        f"{key} {now!r} (was {before!r})" for key, (now, before) in found.items() if key not in _OF_NO_EFFECT
    )
    if found.keys() & _OF_THE_RATE:
        text += "; the learning rate goes on from where the schedule that these settings make has this step"
    return text


def _differences(
    settings: Section, earlier: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(key, value, earlier value) of every setting that differs; one that the earlier config does not know does not."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        before = earlier.get(name, value) if isinstance(earlier, dict) else value
        if isinstance(value, Section):
            yield from _differences(value, before, (*path, name))
        elif value != before:
            yield (*path, name), value, before


def _check_same_run(job: Job, info: CheckpointInfo) -> None:
    """Raise ConfigError naming the first thing that a continued run may not change."""
    for path, value, earlier in _differences(job.config, info.config):
        if path[0] in _MUST_STAY and path[1] not in _MAY_CHANGE.get(path[0], ()):
            raise ConfigError(
                f"{'.'.join(path)} is {value!r}, but {info.directory} was trained with {earlier!r}. Set it back to continue that "
                "run, or choose another run.dir for a new one."
            )
    if info.trainer.get("objective", job.objective_source) != job.objective_source:
        raise ConfigError(
            f"the file of objective.name {job.config.objective.name} has changed since {info.directory} was written: the steps behind "
            "and those ahead would follow different objectives. Bring the earlier file back, or choose another run.dir for a new run."
        )
    if info.corpus is not None and info.corpus != job.corpus.fingerprint:
        raise ConfigError(
            f"data.corpus {job.corpus.directory} is not the corpus that {info.directory} was trained on: its fingerprint is "
            f"{job.corpus.fingerprint[:12]}, not {info.corpus[:12]}. The steps behind and those ahead would be of different "
            "epochs. Bring the earlier corpus back, or choose another run.dir for a new run."
        )


def lock_run(run_dir: Path, at_exit: ExitStack) -> None:
    """Hold the run directory for this process. Raises ConfigError if another job writes to it.

    An advisory lock, which goes with the process; a file system that has none goes without.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = at_exit.enter_context((run_dir / "lock").open("a+", encoding="utf-8"))
    until = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                raise ConfigError(
                    f"{run_dir} is being written to by another job ({file.read().strip()}). Wait for it, end it, or choose another "
                    "run.dir."
                ) from None
            time.sleep(1)
        except OSError:
            return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, Slurm job {os.environ.get('SLURM_JOB_ID', 'none')}\n")
    file.flush()
