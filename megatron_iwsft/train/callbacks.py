"""Hooks: functions with a cadence, called after a step with what it gave."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.config import schema as config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.setup import Job


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


class MetricsWriter:
    """Appends each step's metrics to a JSONL file, after dropping what an interrupted run wrote beyond step `resumed_at`.

    A step that comes again (a rewind) drops what was written since it came first. Numbers that are not finite become null. Where
    the disk is full, lines wait in memory for the next step.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path, self._waiting = path, ""
        self._last = self._size = 0
        self._cut(resumed_at)

    def __call__(self, info: StepInfo) -> None:
        if info.step <= self._last:
            self._cut(info.step - 1)
        self._waiting += json.dumps(_finite(info.metrics)) + "\n"
        self._last = info.step
        self._append()

    def _cut(self, last: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last]
        if kept != lines:  # a new file under the old name: a kill in between loses nothing
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)
        self._last, self._size = last, sum(len(line.encode()) for line in kept)

    def _append(self) -> None:
        data = self._waiting.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.tell() != self._size:
                    file.truncate(self._size)
                written = file.write(data)
        except OSError as error:
            print(f"{self.path}: {error.strerror}; its lines wait in memory.", file=sys.stderr, flush=True)
            return
        if written == len(data):  # else the disk has become full within a line, which is cut off and written again
            self._size, self._waiting = self._size + written, ""


class Events:
    """What happened to a run, for people and, in a JSONL file, for programs; None as path is a rank that keeps quiet."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, event: str, text: str, **details: Any) -> None:
        if self.path is None:
            return
        print(text, flush=True)
        job = {key: os.environ[name] for key, name in _JOB.items() if name in os.environ}
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "text": text, **details, **job}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line)) + "\n")
        except OSError as error:  # a full disk must not end the run
            print(f"{self.path}: {error.strerror}", file=sys.stderr, flush=True)


_JOB = {"slurm_job": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT"}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def start_hooks(job: Job, resumed_at: int, total_steps: int, at_exit: ExitStack) -> list[Hook]:
    """The hooks that a config asks for, on the main rank; writes config.yaml. `at_exit` closes them."""
    config, run_dir = job.config, job.run_directory
    for name in ("logs", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    partial = run_dir / "config.yaml.partial"
    partial.write_text(config.to_yaml(), encoding="utf-8")
    os.replace(partial, run_dir / "config.yaml")
    counts = job.corpus.manifest["counts"]
    print(
        f"{config.run.name}: {config.objective.name} on {len(job.corpus)} trajectories ({counts['trained_tokens']:,} of "
        f"{counts['tokens']:,} tokens trained), {total_steps} steps of {config.data.global_batch_size} sequences; "
        f"{job.platform.device.type}, {job.parallel.describe()}",
        flush=True,
    )
    hooks: list[Hook] = [
        MetricsWriter(run_dir / "metrics.jsonl", resumed_at),
        Every(config.logging.every, progress_line, True),
    ]
    hooks.append(weight_warnings(config.logging, Events(run_dir / "logs" / "events.jsonl")))
    if config.logging.wandb.mode != "disabled":
        hooks.append(wandb_logger(config.logging.wandb, config.run, config.model_dump(), at_exit))
    if config.logging.tensorboard:
        hooks.append(tensorboard_logger(run_dir / "logs"))
    return hooks


def progress_line(info: StepInfo) -> None:
    """One line a person can read."""
    m = info.metrics
    if m.get("loss") is None:
        print(f"step {info.step}/{info.total_steps} | passed over: {m['skipped']}", flush=True)
        return
    parts = [f"step {info.step}/{info.total_steps}", f"loss {m['loss']:.4f}", f"nll {m['nll']:.4f}"]
    if "kl_to_reference" in m:
        parts.append(f"w {m['weight_mean']:.3f} (max {m['weight_max']:.2f}, ess {m['weight_ess']:.2f})")
    parts += [f"grad {m['grad_norm']:.3f}", f"lr {m['lr']:.2e}", f"{m['tokens_per_s']:,.0f} tokens/s"]
    if "eval_nll" in m:
        parts.append(f"eval nll {m['eval_nll']:.4f}")
    if "skipped" in m:
        parts.append(f"skipped: {m['skipped']}")
    print(" | ".join(parts), flush=True)


_STEPS_BETWEEN_WARNINGS = 100


def weight_warnings(settings: config.Logging, events: Events) -> Hook:
    """Say, at most every hundred steps, when few trajectories carry a batch or the clip decides most weights, and what helps."""
    last: dict[str, int] = {}

    def warn(info: StepInfo, what: str, text: str) -> None:
        if info.step - last.get(what, -_STEPS_BETWEEN_WARNINGS) >= _STEPS_BETWEEN_WARNINGS:
            last[what] = info.step
            events(what, f"step {info.step}: {text}", step=info.step)

    def check(info: StepInfo) -> None:
        ess, clipped = info.metrics.get("weight_ess"), info.metrics.get("clip_fraction")
        if ess is not None and ess < settings.warn_ess_below:
            warn(
                info,
                "low effective sample size",
                f"the effective sample size is {ess:.1%} of the batch: few weights carry it. Lower objective.temperature or the upper "
                "clip, take a larger global batch, or refresh the reference.",
            )
        if clipped is not None and clipped > settings.warn_clipped_above:
            warn(
                info,
                "weights at the clip",
                f"the clip decides {clipped:.1%} of the weights, which then say little about their trajectories. Lower "
                "objective.temperature, widen objective.clip, or refresh the reference: the policy has moved far from it.",
            )

    return check


def wandb_logger(settings: config.Wandb, run: config.Run, resolved: dict[str, Any], at_exit: ExitStack) -> Hook:
    """Log metrics to Weights & Biases; offline runs lie in the run directory and are sent by `wandb sync`.

    A resumed run keeps its id, which stands in the run directory. Steps that it repeats are equal to those already logged.
    """
    import wandb

    id_file = Path(run.dir) / "wandb.id"
    if not id_file.exists():
        partial = id_file.with_name("wandb.id.partial")
        partial.write_text(secrets.token_hex(8) + "\n")
        os.replace(partial, id_file)
    handle = wandb.init(
        project=settings.project,
        name=run.name,
        id=id_file.read_text().strip(),
        resume="allow"
        if settings.mode == "online"
        else None,  # offline, the id alone joins the parts when they are sent
        dir=run.dir,
        mode=settings.mode,
        config=resolved,
        # No code, command line or git remote, which may hold credentials, goes into the run directory.
        settings=wandb.Settings(silent=True, disable_git=True, disable_code=True, x_disable_meta=True),
    )
    there = True

    def finish() -> None:
        with contextlib.suppress(OSError):
            handle.finish()

    def log(info: StepInfo) -> None:
        nonlocal there
        if there:
            try:
                handle.log({k: v for k, v in info.metrics.items() if k != "step" and v is not None}, step=info.step)
            except OSError as error:  # its service gets the SIGTERM, too, that Slurm sends to all processes of a job
                there = False
                print(f"wandb's service has gone ({error}); metrics.jsonl has the steps that it lacks.", flush=True)

    at_exit.callback(finish)
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
            if isinstance(value, (int, float)) and name != "step":
                writer.add_scalar(name, value, info.step)
        writer.flush()

    return log
