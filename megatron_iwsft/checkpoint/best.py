"""The checkpoints with the best values of a metric, which are kept beside the newest ones.

They are ordinary checkpoints, `step-…`. The file `best` beside `latest` names them, the best one first; a run's state has their values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_iwsft.checkpoint.info import is_checkpoint_name
from megatron_iwsft.checkpoint.names import BEST, CHECKPOINTS, INFO
from megatron_iwsft.config.evaluation import Best
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.files import read_regular


class BestCheckpoints:
    """Which steps have the best values so far; the same on every rank, and part of every checkpoint.

    entries  (step, value), the best first; the newest may not be saved yet. Of equal values the earlier step is better
    """

    def __init__(self, settings: Best) -> None:
        self.settings = settings
        self.entries: list[tuple[int, float]] = []
        self._before: list[tuple[int, float]] | None = None

    def judge(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After an evaluation, and before `step` is saved."""
        value = metrics.get(self.settings.metric)
        if step == 0 or value is None or not math.isfinite(value):
            return
        found = self._best([*self.entries, (step, float(value))])
        if (step, float(value)) in found:
            self._before, self.entries = self.entries, found

    def wants(self, step: int) -> bool:
        """Whether `step` is to be saved because it is among the best."""
        return step in self.steps

    @property
    def steps(self) -> list[int]:
        """The best one first."""
        return [step for step, _ in self.entries]

    def saved(self) -> None:
        """The newest entry's checkpoint is complete."""
        self._before = None

    def failed(self) -> None:
        """The newest entry could not be saved: those before it are the best again."""
        if self._before is not None:
            self.entries, self._before = self._before, None

    def restrict(self, existing: Collection[int]) -> list[int]:
        """Forget the steps whose checkpoints do not exist; returns them."""
        gone = [step for step in self.steps if step not in existing]
        self.entries = [entry for entry in self.entries if entry[0] in existing]
        return gone

    def state(self) -> dict[str, Any]:
        return {"metric": self.settings.metric, "mode": self.settings.mode, "entries": self.entries}

    def load_state(self, state: dict[str, Any]) -> None:
        """Values of another metric are of no use."""
        same = (state["metric"], state["mode"]) == (self.settings.metric, self.settings.mode)
        self.entries = self._best([(int(step), float(value)) for step, value in state["entries"]]) if same else []
        self._before = None

    def _best(self, entries: list[tuple[int, float]]) -> list[tuple[int, float]]:
        by_value = sorted(entries, key=lambda entry: (self.settings.sign * entry[1], entry[0]))
        return by_value[: self.settings.keep]


def best_checkpoint(directory: str | Path) -> Path:
    """The best checkpoint of a run directory or a directory of checkpoints. Raises CheckpointError if it names none."""
    given = Path(directory)
    for parent in (given, given / CHECKPOINTS):
        if (parent / BEST).exists():
            try:
                name = read_regular(parent / BEST).decode("utf-8").partition("\n")[0].strip()
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{parent / BEST} cannot be read: {error}. Name one of {parent}/step-… instead."
                ) from None
            if not is_checkpoint_name(name) or not (parent / name / INFO).exists():
                raise CheckpointError(
                    f"{parent / BEST} names {name!r:.80}, which is no complete checkpoint there. Name one of {parent}/step-… instead."
                )
            return parent / name
    raise CheckpointError(
        f"{given} has no best checkpoint: there is no file {BEST}, which a run with checkpoint.best writes. Use its latest checkpoint."
    )
