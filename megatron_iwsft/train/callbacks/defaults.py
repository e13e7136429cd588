"""The callbacks that a config asks for, in the order in which they are called."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.train.callbacks.console import progress_line
from megatron_iwsft.train.callbacks.custom import custom_callback
from megatron_iwsft.train.callbacks.evaluation import evaluation
from megatron_iwsft.train.callbacks.export import export
from megatron_iwsft.train.callbacks.metrics_file import METRICS_FILE, MetricsFile
from megatron_iwsft.train.callbacks.slow_ranks import SlowRanks
from megatron_iwsft.train.callbacks.trackers import tensorboard_logger, wandb_logger
from megatron_iwsft.train.callbacks.weight_warnings import WeightWarnings
from megatron_iwsft.train.setup import StartedRun
from megatron_iwsft.utils.files import write_text
from megatron_iwsft.utils.text import printable_line

if TYPE_CHECKING:
    from megatron_iwsft.train.trainer import Trainer


def add_configured_callbacks(trainer: Trainer, writer: CheckpointWriter, at_exit: ExitStack) -> None:
    """Evaluation, custom callbacks, loggers, saving and export. `at_exit` closes loggers."""
    run, config = trainer.run, trainer.run.config
    if run.evaluation is not None:
        trainer.add_callback(
            evaluation(run, trainer.chunks), every=config.evaluation.every, collective=True, phase="evaluation"
        )
    for name, function in run.callbacks.items():
        trainer.insert_callback(custom_callback(name, function, trainer.events))
    if run.is_main:
        _start_run_directory(run)
        events = trainer.events
        metrics_file = run.run_directory / METRICS_FILE
        trainer.add_callback(MetricsFile(metrics_file, trainer.state.step, lambda text: events("file repaired", text)))
        trainer.add_callback(progress_line, every=config.logging.every, at_end=True)
        trainer.add_callback(WeightWarnings(config.logging, trainer.events))
        trainer.add_callback(SlowRanks(trainer.events, trainer.watch.describe))
        if config.logging.wandb.mode != "disabled":
            trainer.add_callback(wandb_logger(config, trainer.events, at_exit))
        if config.logging.tensorboard:
            trainer.add_callback(tensorboard_logger(run.run_directory / "logs"))
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
    counts, config = run.corpus.manifest["counts"], run.config
    print(
        f"{printable_line(config.run.name)}: {config.objective.name} on {len(run.corpus):,} trajectories ({counts['trained_tokens']:,} of "
        f"{counts['tokens']:,} tokens trained), {run.total_steps} steps of global batch size {config.data.global_batch_size}; "
        f"{run.platform.device.type}, {run.layout.describe()}",
        flush=True,
    )
