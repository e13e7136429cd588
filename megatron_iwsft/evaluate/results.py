"""What a run's policy has answered: read by the report. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.jsonl import read_json_lines

EVALUATION, SAMPLES = "evaluation", "samples"  # in a run directory; what they hold is in in_run.py


def results_by_step(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of a run's benchmark results, those of jobs beside it included: step → eval/BENCHMARK/pass@K. Skips damaged files."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted((run / EVALUATION).glob("*/step-*.json")):
        try:
            result = json.loads(path.read_bytes())
            values = {name: float(value["mean"]) for name, value in result.items() if name.startswith("pass@")}
            step = int(result["step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        of_step = found.setdefault(step, {})
        of_step.update({f"eval/{path.parent.name}/{name}": value for name, value in values.items()})
    return found


def samples_of(run: Path) -> list[dict[str, Any]]:
    """The samples of all steps, in order. Skips damaged lines."""
    rows: list[dict[str, Any]] = []
    for path in sorted((run / SAMPLES).glob("step-*.jsonl")):
        rows += read_json_lines(path, valid=lambda i, row: isinstance(row.get("text"), str) and "number" in row)[0]
    return rows
