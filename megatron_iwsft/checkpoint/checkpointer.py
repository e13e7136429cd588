"""`Checkpointer`: a run's checkpoints, from loading the newest complete one to the last save, failures included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_iwsft.checkpoint.best import BestCheckpoints
from megatron_iwsft.checkpoint.info import CheckpointInfo, complete_checkpoints, step_of
from megatron_iwsft.checkpoint.load import load, read_on_first_rank
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter, Saved
from megatron_iwsft.config.schema import Checkpoint
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.errors import CheckpointError, ConfigError

_LAST_RETRY_S = 10.0


class Report(Protocol):
    """Tells people, and the run's event log, what happened."""

    def __call__(self, event: str, text: str, **details: Any) -> None: ...


class Checkpointer:
    """Loads and saves a run's `TrainState`. Every method is collective over all ranks.

    writer  writes the run's checkpoints
    state   what is loaded and saved; `state.step` is current when a method is called
    accept  raises ConfigError if a checkpoint belongs to another run than this one
    report  receives saves, failures and damaged checkpoints
    best    decides which checkpoints are kept for their metric; None: none is

    A save that fails is reported and retried after `settings.retry_after` steps; `settings.max_failures` failures in a row end the run.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        state: TrainState,
        settings: Checkpoint,
        *,
        accept: Callable[[CheckpointInfo], None],
        report: Report,
        best: BestCheckpoints | None = None,
    ) -> None:
        self._writer, self._state, self._settings = writer, state, settings
        self._accept, self._report, self._best = accept, report, best
        self._failures = 0
        self._retry_at: int | None = None
        self._last_good: Path | None = None
        writer.on_saved = self._on_saved
        if best is not None:
            writer.best_steps = lambda: best.steps

    @property
    def directory(self) -> Path:
        return self._writer.root

    def load_newest(self) -> CheckpointInfo | None:
        """Load the newest checkpoint that can be loaded; None if the run has none.

        Raises CheckpointError if none of the run's checkpoints can be loaded, ConfigError if they belong to another run.
        """
        found = self._complete()
        if found and self._settings.resume == "never":
            raise ConfigError(
                f"checkpoint.resume is never, but {self.directory} holds checkpoints. Choose another run.dir, or remove them."
            )
        info = self._load_first_of(found)
        if info is not None and self._best is not None:
            self._check_best(self._best)
        return info

    def _complete(self) -> list[Path]:
        """Complete checkpoints, newest first, as the first rank sees them: on shared file systems, others may see them later."""
        return on_first_rank(lambda: complete_checkpoints(self.directory))

    def _check_best(self, best: BestCheckpoints) -> None:
        """A run can have been killed before `best` was written; checkpoints can have been removed."""
        for step in best.restrict([step_of(directory) for directory in self._complete()]):
            self._report(
                "best checkpoint missing", f"the checkpoint of step {step}, one of the best, is gone.", step=step
            )
        self._writer.point_at_best()

    def judge(self, metrics: Mapping[str, Any]) -> None:
        """After a step, before it is saved: whether its metrics make it one of the best."""
        if self._best is not None and self._best.settings.metric in metrics:
            self._attempt(self._writer.wait)  # whether the best one before is saved must be known
            self._best.judge(self._state.step, metrics)

    def roll_back(self, *, before: int, after: int = 0) -> int | None:
        """Load the newest checkpoint of step `before` or earlier, but not of one before `after`, and remove later ones; returns its step,
        None if there is none.
        """
        self.wait()
        self._state.gather_parameters()
        info = self._load_first_of([d for d in self._complete() if after <= step_of(d) <= before])
        if info is None:
            return None
        self._writer.discard_after(info.step)
        return info.step

    def _load_first_of(self, candidates: list[Path]) -> CheckpointInfo | None:
        first_problem = ""
        for directory in candidates:
            try:
                info = read_on_first_rank(directory)
                self._accept(info)
                has_random_states = self._state.optimizer is not None  # as the writer saves them
                load(info, self._state, random=has_random_states and info.layout == self._writer.layout)
            except CheckpointError as error:  # on all ranks
                first_problem = first_problem or str(error)
                self._report("damaged checkpoint", f"skipping a checkpoint: {error}")
                continue
            self._last_good = directory
            return info
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.directory} can be loaded. The newest one: {first_problem} To start "
                "over instead, choose another run.dir."
            )
        return None

    def after_step(self) -> None:
        """Complete a background save, and save if this step is due. Raises CheckpointError after too many failures."""
        step, every = self._state.step, self._settings.every
        due = (bool(every) and step % every == 0) or (self._best is not None and self._best.wants(step))
        if due or (self._retry_at is not None and step >= self._retry_at):
            self._attempt(lambda: self._writer.save(self._state))
        else:
            self._attempt(self._writer.poll)

    def save_now(self, *, leaving: bool = False) -> bool:
        """Save this step, unless it is saved already, and wait until the checkpoint is complete; returns whether that succeeded.

        leaving: the run ends whatever happens, so a failure is reported and nothing more.
        """
        if not self._attempt(self._writer.wait, leaving):
            return False
        if self._last_good is not None and step_of(self._last_good) == self._state.step:
            return True

        def save() -> None:
            self._writer.save(self._state)
            self._writer.wait()

        return self._attempt(save, leaving)

    def finish(self) -> None:
        """Save the last step, retrying until `max_failures` in a row. Raises CheckpointError."""
        while not self.save_now():
            time.sleep(_LAST_RETRY_S)

    def wait(self) -> None:
        """Wait for a background save."""
        self._attempt(self._writer.wait)

    @property
    def last_checkpoint_text(self) -> str:
        """Which checkpoint is the last good one, as a sentence for people."""
        return f"The last good checkpoint is {self._last_good}." if self._last_good else "There is no checkpoint yet."

    def _attempt(self, action: Callable[[], Any], leaving: bool = False) -> bool:
        step = self._state.step
        try:
            action()
        except CheckpointError as error:
            self._failures += 1
            if self._best is not None:
                self._best.failed()
            if self._failures >= self._settings.max_failures and not leaving:
                raise CheckpointError(
                    f"{error} This is failure {self._failures} in a row (checkpoint.max_failures), so the run ends. "
                    f"{self.last_checkpoint_text} "
                    "Fix what the message names, then start the run again."
                ) from None
            self._retry_at = step + self._settings.retry_after
            retry = f"Training continues, and the save is retried after {self._settings.retry_after} steps. "
            self._report(
                "save failed",
                f"saving after step {step} failed: {error} {'' if leaving else retry}{self.last_checkpoint_text}",
                step=step,
            )
            return False
        return True

    def _on_saved(self, saved: Saved) -> None:
        self._last_good, self._failures, self._retry_at = saved.directory, 0, None
        if self._best is not None:
            self._best.saved()
        self._report(
            "saved",
            f"saved {saved.directory.name}: {saved.bytes / 1e9:.2f} GB; training waited {saved.stall_s:.2f} s, complete after "
            f"{saved.total_s:.2f} s",
            step=saved.step,
            bytes=saved.bytes,
            stall_s=saved.stall_s,
            total_s=saved.total_s,
        )
