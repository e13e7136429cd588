"""When a run saves, and what becomes of it if that fails: training goes on, it is said, tried again, and at last the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_iwsft.checkpoint.writer import CheckpointWriter, Saved
from megatron_iwsft.config.schema import Checkpoint
from megatron_iwsft.errors import CheckpointError

_LAST_RETRY_S = 10.0


class Saver:
    """Saves after every `settings.every`-th step.

    write(writer, step) saves; failed(step, why) tells of a failure. Methods are collective over all ranks.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        settings: Checkpoint,
        write: Callable[[CheckpointWriter, int], Any],
        failed: Callable[[int, str], None],
    ) -> None:
        self.writer, self.settings = writer, settings
        self._write, self._failed = write, failed
        self._failures = 0
        self._retry_at: int | None = None
        self.last_good: Saved | None = None
        announce = writer.on_saved

        def on_saved(saved: Saved) -> None:
            self.last_good, self._failures, self._retry_at = saved, 0, None
            if announce is not None:
                announce(saved)

        writer.on_saved = on_saved

    def after(self, step: int) -> None:
        """Between two steps: complete a background save, and save if `step` is due. Raises CheckpointError after too many failures."""
        due = bool(self.settings.every) and step % self.settings.every == 0
        if due or (self._retry_at is not None and step >= self._retry_at):
            self._attempt(step, lambda: self._write(self.writer, step))
        else:
            self._attempt(step, self.writer.poll)

    def now(self, step: int) -> bool:
        """Save `step`, unless it is saved already, and wait until it is whole; whether that succeeded."""
        if not self._attempt(step, self.writer.wait):
            return False
        if self.last_good is not None and self.last_good.step == step:
            return True

        def write() -> None:
            self._write(self.writer, step)
            self.writer.wait()

        return self._attempt(step, write)

    def at_end(self, step: int) -> None:
        """Save the last step, trying `max_failures` times. Raises CheckpointError."""
        while not self.now(step):
            time.sleep(_LAST_RETRY_S)

    def _attempt(self, step: int, action: Callable[[], Any]) -> bool:
        try:
            action()
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= self.settings.max_failures:
                raise CheckpointError(
                    f"{error} This was failure {self._failures} in a row (checkpoint.max_failures), so the run ends; "
                    f"{self.standing()}"
                ) from None
            self._retry_at = step + self.settings.retry_after
            self._failed(step, str(error))
            return False
        return True

    def standing(self) -> str:
        """Which checkpoint stands, for people."""
        return (
            f"the last good checkpoint is {self.last_good.directory}."
            if self.last_good
            else "there is no checkpoint yet."
        )
