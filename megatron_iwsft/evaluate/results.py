"""What a run's policy has answered: read by the report. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

from typing_extensions import TypedDict

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS, Count, fits, read_json
from megatron_iwsft.utils.jsonl import read_json_lines

EVALUATION, SAMPLES = "evaluation", "samples"  # in a run directory; what they hold is in in_run.py


class _Mean(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    mean: float


class _Result(TypedDict):
    """With a `_Mean` for each pass@K."""

    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    step: Count


class _Sample(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    number: Count
    text: str
    weight: NotRequired[float | None]


def results_by_step(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of a run's benchmark results, those of jobs beside it included: step → eval/BENCHMARK/pass@K. Skips damaged files."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted((run / EVALUATION).glob("*/step-*.json")):
        try:
            result: Any = read_json(path, _Result, DataError, advice="")
        except (OSError, DataError):
            continue
        means = {
            name: value["mean"] for name, value in result.items() if name.startswith("pass@") and fits(value, _Mean)
        }
        of_step = found.setdefault(result["step"], {})
        of_step.update({f"eval/{path.parent.name}/{name}": mean for name, mean in means.items()})
    return found


def samples_of(run: Path) -> list[dict[str, Any]]:
    """The samples of all steps, in order. Skips damaged lines."""
    rows: list[dict[str, Any]] = []
    for path in sorted((run / SAMPLES).glob("step-*.jsonl")):
        with suppress(OSError):
            rows += read_json_lines(path, valid=lambda i, row: fits(row, _Sample))[0]
    return rows
