"""Experiment trackers: Weights & Biases and TensorBoard. Others are custom callbacks of a few lines."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_iwsft.checkpoint.info import complete_checkpoints, step_of
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.metrics import TIMING
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.metrics_file import METRICS_FILE, read_metrics_file
from megatron_iwsft.train.callbacks.wandb_file import last_step
from megatron_iwsft.utils.files import move_aside, write_text
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.text import tell

_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


def grouped(name: str) -> str:
    """A metric's name in trackers: train/…, eval/… or perf/…."""
    if name.startswith(("eval_", "eval/")):
        return f"eval/{name[5:]}"
    return f"perf/{name}" if name in TIMING else f"train/{name}"


def wandb_logger(config: Config, events: Events, at_exit: ExitStack) -> Callable[[StepResult], None]:
    """Log metrics to Weights & Biases. Offline runs are stored in the run directory; `wandb sync` uploads them.

    A resumed run keeps its id, which is stored in the run directory. It logs the rows of metrics.jsonl that wandb lacks, because the run
    was killed before they were written, and not again those that it has.
    """
    import wandb

    run, settings = config.run, config.logging.wandb
    run_id = _run_id(Path(run.dir) / "wandb.id", events)
    logged = last_step(Path(run.dir), run_id)
    handle = wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags or None,
        notes=settings.notes,
        name=run.name,
        id=run_id,
        # Offline, the id alone joins the parts when they are uploaded.
        resume="allow" if settings.mode == "online" else None,
        dir=run.dir,
        mode=settings.mode,
        config=config.model_dump() | {"slurm": slurm_job()},
        # Code, command line and git remote may contain credentials: they are not stored.
        settings=wandb.Settings(silent=True, disable_git=True, disable_code=True, x_disable_meta=True),
    )
    connected = is_behind = True

    def finish() -> None:
        with contextlib.suppress(Exception):  # metrics.jsonl is complete
            if settings.artifacts and connected:
                _log_checkpoint(wandb, handle, config)
            handle.finish()
            wandb.teardown()  # its service may still have the last rows in memory, and a stopped run ends without its exit handlers

    if settings.mode == "online":  # the server knows
        logged = handle.step - 1

    def log_row(metrics: Mapping[str, Any], step: int) -> None:
        nonlocal connected
        if connected and step > logged:
            try:
                values = {grouped(k): v for k, v in metrics.items() if k != "step" and v is not None}
                handle.log(values, step=step)
            except OSError as error:  # its service also gets the SIGTERM that Slurm sends to all processes of a job
                connected = False
                tell(f"lost connection to wandb ({error}); metrics.jsonl is complete.")

    def log(result: StepResult) -> None:
        nonlocal is_behind
        if is_behind:
            is_behind = False
            with contextlib.suppress(OSError):
                for row in read_metrics_file(Path(run.dir) / METRICS_FILE)[0]:
                    if row["step"] < result.step:
                        log_row(row, row["step"])
        log_row(result.metrics, result.step)

    at_exit.callback(finish)
    return log


def slurm_job() -> dict[str, str]:
    """The Slurm job that this process belongs to; empty outside of one."""
    names = {"job": "SLURM_JOB_ID", "array_job": "SLURM_ARRAY_JOB_ID", "nodes": "SLURM_JOB_NODELIST"}
    names |= {"partition": "SLURM_JOB_PARTITION", "restarts": "SLURM_RESTART_COUNT"}
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def _log_checkpoint(wandb: Any, handle: Any, config: Config) -> None:
    """Log the newest checkpoint as an artifact that refers to its directory."""
    found = complete_checkpoints(Path(config.run.dir) / CHECKPOINTS)
    if found:
        artifact = wandb.Artifact(config.run.name, type="checkpoint", metadata={"step": step_of(found[0])})
        artifact.add_reference(found[0].absolute().as_uri(), checksum=False)
        handle.log_artifact(artifact)


def _run_id(path: Path, events: Events) -> str:
    """The id in `path`; a new one if there is none. A file with anything else is moved aside."""
    if os.path.lexists(path):
        found = path.read_bytes()[:100].strip() if is_regular_file(path) else b""
        if _ID.fullmatch(found):
            return found.decode()
        events(
            "file repaired",
            f"{path} does not hold a wandb run id. It was moved to {move_aside(path).name}; wandb shows what follows as a new run.",
        )
    write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def tensorboard_logger(directory: Path, resumed_at: int, at_exit: ExitStack) -> Callable[[StepResult], None]:
    """Write scalars for TensorBoard, which hides what an interrupted run wrote after step `resumed_at`. Raises ConfigError if it is not
    installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("logging.tensorboard needs the package tensorboard: pip install tensorboard.") from None

    # A new run has nothing to hide, and with purge_step 1 TensorBoard would hide another run's files in the same directory.
    writer = SummaryWriter(str(directory), purge_step=resumed_at + 1 if resumed_at else None)

    def close() -> None:
        with contextlib.suppress(Exception):  # a full disk
            writer.close()

    at_exit.callback(close)

    def log(result: StepResult) -> None:
        for name, value in result.metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(grouped(name), value, result.step)
        writer.flush()

    return log
