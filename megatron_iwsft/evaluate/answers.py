"""The stored answers of one model to one benchmark, OUTPUT/BENCHMARK/MODEL.jsonl. Imports no torch: the report reads them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS, fits
from megatron_iwsft.utils.jsonl import read_json_lines

FORMAT_VERSION = 1


class _Header(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    format_version: int
    weights: str
    settings: dict[str, Any]


class _JudgedAnswer(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    text: str
    tokens: int
    cut_off: bool
    correct: bool


class _AnsweredProblem(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    number: int
    prompt: str
    answer: str
    answers: list[_JudgedAnswer]


def is_answers_line(index: int, row: dict[str, Any], samples: int | None = None) -> bool:
    """Whether `row` can be line `index`, from 0, of such a file, with `samples` answers per problem (None: at least one)."""
    if index == 0:
        return fits(row, _Header)
    return fits(row, _AnsweredProblem) and len(row["answers"]) == (samples or max(1, len(row["answers"])))


def read_answers(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]] | None:
    """(first line, problem number → its line) of the undamaged start of such a file. None for another file. Raises OSError."""
    samples: list[int] = []  # of the first problem: all have as many

    def valid(index: int, row: dict[str, Any]) -> bool:
        if not is_answers_line(index, row, *samples[:1]):
            return False
        samples.extend([len(row["answers"])] if index else [])
        return True

    lines, _ = read_json_lines(path, valid=valid)
    return (lines[0], {line["number"]: line for line in lines[1:]}) if len(lines) > 1 else None
