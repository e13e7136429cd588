"""Experiment trackers: Weights & Biases and TensorBoard. Others are custom callbacks of a few lines."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.utils.files import move_aside, write_text
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.text import say

_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


def wandb_logger(config: Config, events: Events, at_exit: ExitStack) -> Callable[[StepResult], None]:
    """Log metrics to Weights & Biases. Offline runs are stored in the run directory; `wandb sync` uploads them.

    A resumed run keeps its id, which is stored in the run directory. Steps that it repeats are equal to those already logged.
    """
    import wandb

    run, settings = config.run, config.logging.wandb
    handle = wandb.init(
        project=settings.project,
        name=run.name,
        id=_run_id(Path(run.dir) / "wandb.id", events),
        # Offline, the id alone joins the parts when they are uploaded.
        resume="allow" if settings.mode == "online" else None,
        dir=run.dir,
        mode=settings.mode,
        config=config.model_dump(),
        # Code, command line and git remote may contain credentials: they are not stored.
        settings=wandb.Settings(silent=True, disable_git=True, disable_code=True, x_disable_meta=True),
    )
    connected = True

    def finish() -> None:
        with contextlib.suppress(OSError):
            handle.finish()

    def log(result: StepResult) -> None:
        nonlocal connected
        if connected:
            try:
                handle.log({k: v for k, v in result.metrics.items() if k != "step" and v is not None}, step=result.step)
            except OSError as error:  # its service also gets the SIGTERM that Slurm sends to all processes of a job
                connected = False
                say(f"lost connection to wandb ({error}); metrics.jsonl is complete.")

    at_exit.callback(finish)
    return log


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


def tensorboard_logger(directory: Path) -> Callable[[StepResult], None]:
    """Write scalars for TensorBoard. Raises ConfigError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("logging.tensorboard needs the package tensorboard: pip install tensorboard.") from None

    writer = SummaryWriter(str(directory))

    def log(result: StepResult) -> None:
        for name, value in result.metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(name, value, result.step)
        writer.flush()

    return log
