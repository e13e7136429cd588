"""The callbacks that a config asks for, in the order in which they are called."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.train.callbacks.answers import answers
from megatron_iwsft.train.callbacks.console import console
from megatron_iwsft.train.callbacks.custom import custom_callback, guarded
from megatron_iwsft.train.callbacks.evaluation import evaluation
from megatron_iwsft.train.callbacks.export import export
from megatron_iwsft.train.callbacks.metrics_file import METRICS_FILE, MetricsFile
from megatron_iwsft.train.callbacks.slow_ranks import SlowRanks
from megatron_iwsft.train.callbacks.trackers import tensorboard_logger, wandb_logger
from megatron_iwsft.train.callbacks.weight_warnings import WeightWarnings, warn_about_settings
from megatron_iwsft.train.setup import StartedRun
from megatron_iwsft.utils.files import write_text
from megatron_iwsft.utils.text import tell

if TYPE_CHECKING:
    from megatron_iwsft.train.trainer import Trainer


def add_configured_callbacks(trainer: Trainer, writer: CheckpointWriter, at_exit: ExitStack) -> None:
    """Evaluation, custom callbacks, loggers, saving and export. `at_exit` closes loggers."""
    run, config = trainer.run, trainer.run.config
    if run.held_out:
        scales_are_1 = config.precision.scaled_by_steps
        if scales_are_1 and trainer.state.step == 0:
            trainer.events(
                "no evaluation",
                "evaluation sets are not evaluated before the first step: until then the scales of precision.fp8 delayed are 1.",
                step=0,
            )
        trainer.add_callback(
            evaluation(trainer),
            every=config.evaluation.every,
            at_start=not scales_are_1,
            at_end=True,
            collective=True,
            phase="evaluation",
        )
    if config.evaluation.answers.wanted:
        trainer.add_callback(
            answers(trainer, writer),
            every=config.evaluation.answers.every,
            at_start=True,
            at_end=True,
            collective=True,
            phase="answers",
        )
    for name, function in run.callbacks.items():
        trainer.insert_callback(custom_callback(name, function, trainer.events))
    if run.is_main:
        _start_run_directory(run)
        events = trainer.events
        metrics_file = run.run_directory / METRICS_FILE
        to_file = MetricsFile(metrics_file, trainer.state.step, lambda text: events("file repaired", text))
        trainer.add_callback(to_file, at_start=True)
        shown = console(
            config.logging,
            platform=run.platform,
            peak_tflops=trainer.peak_tflops,
            at_exit=at_exit,
        )
        trainer.add_callback(shown, at_start=True)
        if trainer.state.step == 0:
            warn_about_settings(run, events)
        trainer.add_callback(WeightWarnings(config.logging, events))
        trainer.add_callback(SlowRanks(events, trainer.watch.describe, run.layout))
        if config.logging.wandb.mode != "disabled":
            to_wandb = wandb_logger(config, events, at_exit)
            trainer.add_callback(guarded("wandb logger", to_wandb, events), at_start=True)
        if config.logging.tensorboard:
            to_tensorboard = tensorboard_logger(run.run_directory / "logs", trainer.state.step, at_exit)
            trainer.add_callback(guarded("TensorBoard logger", to_tensorboard, events), at_start=True)
    trainer.add_callback(trainer.save, collective=True, phase="saving", saves=True)
    trainer.add_callback(
        export(run, trainer.state, writer, trainer.report_failure),
        every=config.export.every,
        at_end=config.export.at_end,
        collective=True,
        phase="exporting",
        saves=True,
    )


def _start_run_directory(run: StartedRun) -> None:
    """Create it, write config.yaml, and print what will be trained."""
    for name in ("logs", CHECKPOINTS):
        (run.run_directory / name).mkdir(parents=True, exist_ok=True)
    write_text(run.run_directory / "config.yaml", run.config.to_yaml())
    counts, config, data = run.mixture.counts, run.config, run.config.data
    for line in (
        f"{config.run.name}: {config.objective.name} on {len(run.mixture):,} trajectories ({counts['trained_tokens']:,} of "
        f"{counts['tokens']:,} tokens trained), {run.total_steps} steps of {data.global_batch_size} × {data.seq_length:,} tokens; "
        f"{run.platform.device.type}, {run.layout.describe()}",
        *(f"  {share}" for share in _shares(run)),
    ):
        tell(line)


def _shares(run: StartedRun) -> list[str]:
    """One line per corpus of a mixture: what it contributes to the first epoch."""
    mixture = run.mixture
    if len(mixture.corpora) < 2:
        return []
    times = run.sampler.appearances(0)
    trajectories = np.add.reduceat(times, mixture.starts[:-1])
    tokens = np.add.reduceat(times * mixture.lengths, mixture.starts[:-1])
    return [
        f"{name}: {count / len(corpus):.4g} passes over {len(corpus):,} trajectories per epoch; "
        f"{count / trajectories.sum():.1%} of the trajectories, {size / tokens.sum():.1%} of the tokens"
        for name, corpus, count, size in zip(mixture.names, mixture.corpora, trajectories, tokens, strict=True)
    ]
