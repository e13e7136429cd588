"""Read a run directory: its metrics, config and events, as far as they are there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_iwsft.config.loader import read_yaml
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.evaluate.results import results_by_step, samples_of
from megatron_iwsft.train.callbacks.metrics_file import METRICS_FILE, read_metrics_file
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.jsonl import read_json_lines
from megatron_iwsft.utils.text import printable, printable_line, say

Line = dict[str, Any]
_LARGEST = 1e100  # larger numbers would leave every axis unreadable


@dataclass(frozen=True)
class RunRecord:
    """What a run has left.

    name      for people, unique on the page
    metrics   one dict per step; at least one
    settings  the config, flattened: "optimizer.lr" → value; empty if config.yaml is missing or damaged
    config    the text of config.yaml
    events    the lines of logs/events.jsonl
    samples   the policy's answers to fixed prompts, step by step
    """

    name: str
    directory: Path
    metrics: list[Line]
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    events: list[Line] = field(default_factory=list)
    samples: list[Line] = field(default_factory=list)

    def values(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric is a finite number."""
        numbers = ((line["step"], finite(line.get(metric))) for line in self.metrics)
        return [(step, number) for step, number in numbers if number is not None]

    def recent(self, metric: str) -> float | None:
        """Mean of the metric over the last tenth of its steps: one batch is too noisy to compare."""
        values = [value for _, value in self.values(metric)]
        tail = values[-max(1, len(values) // 10) :]
        return math.fsum(tail) / len(tail) if tail else None

    @property
    def held_out_nll(self) -> dict[str, float]:
        """The last negative log-likelihood on each evaluation set; "" is the only set of runs that name none."""
        found: dict[str, float] = {}
        for line in self.metrics:
            for name, value in line.items():
                parts = name.split("/")
                number = finite(value)
                if number is not None and (name == "eval_nll" or (len(parts) == 3 and parts[0::2] == ["eval", "nll"])):
                    found[parts[1] if len(parts) == 3 else ""] = number
        return found


def finite(value: Any) -> float | None:
    """A metric's value, if it is a number that can be plotted."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None


def read_runs(directories: list[Path]) -> list[RunRecord]:
    """Raises DataError if one is not a run directory."""
    names = _names(directories)
    return [_read_run(directory, name) for directory, name in zip(directories, names, strict=True)]


def _names(directories: list[Path]) -> list[str]:
    """The directories' own names if these differ, otherwise their paths."""
    short = [printable_line(directory.resolve().name) for directory in directories]
    return short if len(set(short)) == len(short) else [printable_line(str(directory)) for directory in directories]


def _read_run(directory: Path, name: str) -> RunRecord:
    results = results_by_step(directory)  # a job beside the run may have written them after the step's line
    metrics = [results.get(line["step"], {}) | line for line in read_metrics(directory)]
    config = directory / "config.yaml"
    text = printable(config.read_bytes().decode("utf-8", "replace")) if is_regular_file(config) else ""
    return RunRecord(name, directory, metrics, _settings(text), text, _read_events(directory), samples_of(directory))


def read_metrics(run: Path) -> list[Line]:
    """Read RUN/metrics.jsonl, up to the first damaged line, which is reported on standard error.

    Raises DataError if it is missing or has no valid line.
    """
    path = run / METRICS_FILE
    try:
        lines, damage = read_metrics_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{run} is not a run directory: it has no {METRICS_FILE}. Give the directory that run.dir names in the run's config."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    if not lines:
        raise DataError(
            f"{path} is damaged: {damage}. Restore it from a copy, or leave the run out."
            if damage
            else f"{path} is empty: the run has not finished a step. Run this again once it has."
        )
    if damage:
        say(f"{path} is damaged: {damage}. The {len(lines):,} lines before it are shown.", error=True)
    return lines


def _read_events(run: Path) -> list[Line]:
    path = run / "logs" / "events.jsonl"
    if not is_regular_file(path):
        return []
    try:
        lines, damage = read_json_lines(path, valid=lambda i, row: isinstance(row.get("event"), str))
    except OSError as error:
        say(f"{path} cannot be read: {error.strerror}. The report has no events of {run}.", error=True)
        return []
    if damage:
        say(f"{path} is damaged: {damage}. The {len(lines):,} events before it are shown.", error=True)
    return lines


def _settings(text: str) -> dict[str, Any]:
    try:
        loaded = read_yaml(text, "config.yaml")
    except ConfigError:
        return {}
    return dict(_flat(loaded)) if isinstance(loaded, dict) else {}


def _flat(value: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def config_differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """(field, its value in each run) of the config fields that are not the same in all runs; run.name and run.dir always differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [_shown(run.settings.get(name, "–")) for run in runs]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1 and name not in ("run.name", "run.dir")]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else printable_line(str(value))
