"""Experiment trackers: Weights & Biases and TensorBoard. Others are custom callbacks of a few lines."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.files import write_text


def wandb_logger(config: Config, at_exit: ExitStack) -> Callable[[StepResult], None]:
    """Log metrics to Weights & Biases. Offline runs are stored in the run directory; `wandb sync` uploads them.

    A resumed run keeps its id, which is stored in the run directory. Steps that it repeats are equal to those already logged.
    """
    import wandb

    run, settings = config.run, config.logging.wandb
    id_file = Path(run.dir) / "wandb.id"
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(8) + "\n")
    handle = wandb.init(
        project=settings.project,
        name=run.name,
        id=id_file.read_text().strip(),
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
                print(f"lost connection to wandb ({error}); metrics.jsonl is complete.", flush=True)

    at_exit.callback(finish)
    return log


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
