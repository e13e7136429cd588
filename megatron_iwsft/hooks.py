"""Hooks: functions with a cadence, called after a step with what it gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft import config
from megatron_iwsft.errors import ConfigError


@dataclass(frozen=True)
class StepInfo:
    """What a finished step hands to hooks. step counts finished steps; metrics as in metrics.jsonl."""

    step: int
    total_steps: int
    metrics: dict[str, Any]


Hook = Callable[[StepInfo], None]


@dataclass(frozen=True)
class Every:
    """Call `hook` after every `steps`-th step, and after the last one if `at_end`."""

    steps: int
    hook: Hook
    at_end: bool = False

    def __call__(self, info: StepInfo) -> None:
        if (self.steps and info.step % self.steps == 0) or (self.at_end and info.step == info.total_steps):
            self.hook(info)


def metrics_writer(path: Path, resumed_at: int) -> Hook:
    """Append each step's metrics to a JSONL file, after dropping what an interrupted run wrote beyond step `resumed_at`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_at]
    path.write_text("".join(kept), encoding="utf-8")

    def write(info: StepInfo) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(info.metrics) + "\n")

    return write


def progress_line(info: StepInfo) -> None:
    """One line a person can read."""
    m = info.metrics
    parts = [f"step {info.step}/{info.total_steps}", f"loss {m['loss']:.4f}", f"nll {m['nll']:.4f}"]
    if "kl_to_reference" in m:
        parts.append(f"w {m['weight_mean']:.3f} (max {m['weight_max']:.2f}, ess {m['weight_ess']:.2f})")
    parts += [f"grad {m['grad_norm']:.3f}", f"lr {m['lr']:.2e}", f"{m['tokens_per_s']:,.0f} tokens/s"]
    if "eval_nll" in m:
        parts.append(f"eval nll {m['eval_nll']:.4f}")
    print(" | ".join(parts), flush=True)


def wandb_logger(settings: config.Wandb, run: config.Run, resolved: dict[str, Any]) -> Hook:
    """Log metrics to Weights & Biases; offline runs lie in the run directory and are sent by `wandb sync`."""
    import wandb

    handle = wandb.init(
        project=settings.project,
        name=run.name,
        dir=run.dir,
        mode=settings.mode,
        config=resolved,
        settings=wandb.Settings(silent=True),
    )

    def log(info: StepInfo) -> None:
        handle.log({k: v for k, v in info.metrics.items() if k != "step"}, step=info.step)
        if info.step == info.total_steps:
            handle.finish()

    return log


def tensorboard_logger(directory: Path) -> Hook:
    """Write scalars for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("logging.tensorboard needs the package tensorboard: pip install tensorboard.") from None

    writer = SummaryWriter(str(directory))

    def log(info: StepInfo) -> None:
        for name, value in info.metrics.items():
            if name != "step":
                writer.add_scalar(name, value, info.step)
        writer.flush()

    return log
