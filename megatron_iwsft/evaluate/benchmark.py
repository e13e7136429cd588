"""Benchmarks with verifiable answers: JSONL files in the formats of GSM8K, MATH-500 and AIME, and the judging of answers.

GSM8K      question, answer      the answer stands after #### at the end of a worked solution
MATH-500   problem, answer       LaTeX
AIME       problem, answer       an integer, as a number or a string
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError

_PROMPT_FIELDS = ("question", "problem", "prompt")
_ANSWER_FIELDS = ("answer", "expected_answer", "solution")
_GSM8K_MARK = "####"


@dataclass(frozen=True)
class Problem:
    """number: its line in the file, from 1; answer: the expected one, as math-verify is to read it."""

    number: int
    prompt: str
    answer: str


def read_benchmark(
    path: str | Path, *, prompt_field: str | None = None, answer_field: str | None = None, limit: int | None = None
) -> list[Problem]:
    """The first `limit` problems of a JSONL file. Raises DataError naming the line that cannot be used and why."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the benchmark {path} does not exist.")
    problems: list[Problem] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(problems) == limit:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} must be a JSON object; it is {type(row).__name__}.")
            prompt = _field(row, prompt_field, _PROMPT_FIELDS, "prompt", where)
            answer = expected_answer(_field(row, answer_field, _ANSWER_FIELDS, "answer", where))
            if not read_answer(answer):
                raise DataError(f"{where}: math-verify finds no answer in {answer!r}.")
            problems.append(Problem(number, prompt, answer))
    if not problems:
        raise DataError(f"the benchmark {path} holds no problems.")
    return problems


def benchmark_hash(problems: list[Problem]) -> str:
    return hashlib.sha256(json.dumps([(p.number, p.prompt, p.answer) for p in problems]).encode()).hexdigest()


def _field(row: dict[str, Any], given: str | None, known: tuple[str, ...], kind: str, where: str) -> str:
    by_name = {name.lower(): value for name, value in row.items()}
    for name in (given.lower(),) if given else known:
        value = by_name.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    raise DataError(
        f"{where} has no {kind} under {given or ', '.join(known)}; it has {', '.join(row)}. Name the field with --{kind}-field."
    )


def expected_answer(text: str) -> str:
    """The answer in a benchmark's answer field, in a form that math-verify reads as nothing but an answer."""
    if _GSM8K_MARK in text:
        text = text.rsplit(_GSM8K_MARK, 1)[1]
    elif "\\boxed" in text:  # a worked solution
        return text
    return f"\\boxed{{{text.strip()}}}"


def read_answer(text: str) -> list[Any]:
    """What math-verify reads as the answer of a text: a few equivalent forms, or nothing."""
    from math_verify import parse

    return parse(text)


def is_correct(answer: str, response: str) -> bool:
    """Whether a model's response gives `answer`, a `Problem`'s, mathematically.

    Of a response that thinks first, what follows the thinking counts; of one in GSM8K's style, what follows the last ####.
    """
    from math_verify import verify

    if "<think>" in response and "</think>" not in response:
        return False
    response = response.rsplit("</think>", 1)[-1]
    if _GSM8K_MARK in response:
        lines = response.rsplit(_GSM8K_MARK, 1)[1].strip().splitlines()
        response = lines[0] if lines else ""
    return bool(verify(read_answer(answer), read_answer(response)))
