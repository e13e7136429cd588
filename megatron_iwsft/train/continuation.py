"""Continuing a run: what may differ from the run that wrote a checkpoint, and the lock on the run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.setup import CheckedRun
from megatron_iwsft.utils.files import open_for_writing

# What may differ between a run and its continuation. Anything else would make it another run.
_MAY_CHANGE = {
    "run": {"name", "dir", "device", "hang_timeout_s", "max_bad_steps", "spike"},
    "data": {"corpus", "micro_batch_size", "epochs", "max_steps", "verify"},
}
_MUST_STAY = ("model", "data", "objective", "reference", "precision", "run")
_NOT_REPORTED = {"run.name", "run.dir"}
_AFFECTS_LR_SCHEDULE = {
    "data.epochs",
    "data.max_steps",
    *(f"optimizer.{k}" for k in ("lr", "min_lr", "schedule", "warmup_fraction")),
}
# A killed run's lock is released with the last of its processes.
_LOCK_PATIENCE_S = 15.0


def described_changes(config: Config, earlier: dict[str, Any]) -> str:
    """How `config` differs from the one that a checkpoint was saved with, for the log; empty if it does not."""
    found = {".".join(path): (value, before) for path, value, before in _differences(config, earlier)}
    text = ", ".join(
        f"{key} {now!r} (was {before!r})" for key, (now, before) in found.items() if key not in _NOT_REPORTED
    )
    if found.keys() & _AFFECTS_LR_SCHEDULE:
        text += "; the learning-rate schedule was recomputed from the new settings"
    return text


def _differences(
    settings: Section, earlier: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(key, value, earlier value) of every setting that differs. One that is missing in the earlier config does not count."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        before = earlier.get(name, value) if isinstance(earlier, dict) else value
        if isinstance(value, Section):
            yield from _differences(value, before, (*path, name))
        elif value != before:
            yield (*path, name), value, before


def check_same_run(run: CheckedRun, info: CheckpointInfo) -> None:
    """Raise ConfigError naming the first thing that differs and may not."""
    for path, value, earlier in _differences(run.config, info.config):
        if path[0] in _MUST_STAY and path[1] not in _MAY_CHANGE.get(path[0], ()):
            raise ConfigError(
                f"{'.'.join(path)} is {value!r}, but {info.directory} was trained with {earlier!r}. Set it back to continue that run, or "
                "choose another run.dir for a new one."
            )
    if info.objective != run.objective_source:
        raise ConfigError(
            f"the file of objective.name {run.config.objective.name} has changed since {info.directory} was written, so earlier and later "
            "steps would use different objectives. Restore the earlier file, or choose another run.dir for a new run."
        )
    if info.corpus is not None and info.corpus != run.corpus.fingerprint:
        raise ConfigError(
            f"data.corpus {run.corpus.directory} is not the corpus that {info.directory} was trained on: its fingerprint is "
            f"{run.corpus.fingerprint[:12]}, not {info.corpus[:12]}. Restore the earlier corpus, or choose another run.dir for a new run."
        )


def lock_run(run_dir: Path, at_exit: ExitStack) -> None:
    """Lock the run directory for this process. Raises ConfigError if another job writes to it.

    The lock is advisory and released when the process ends; on a file system without locks there is none.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = at_exit.enter_context(open_for_writing(run_dir / "lock", os.O_RDWR | os.O_APPEND))
    directory = os.open(run_dir, os.O_RDONLY)
    at_exit.callback(os.close, directory)
    # The directory, too, because the file may be removed while the job runs; network file systems lock only files.
    for handle in (directory, file.fileno()):
        if not _locked(handle):
            file.seek(0)
            raise ConfigError(
                f"{run_dir} is in use by another job ({file.read().strip()}). Wait for it, stop it, or choose another run.dir."
            )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, Slurm job {os.environ.get('SLURM_JOB_ID', 'none')}\n")
    file.flush()


def _locked(handle: int) -> bool:
    """Lock a file or directory, or find it locked by another process for `_LOCK_PATIENCE_S`. True where there are no locks."""
    until = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(1)
        except OSError:
            return True
