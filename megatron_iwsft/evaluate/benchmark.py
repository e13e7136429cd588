"""Read benchmarks with verifiable answers (GSM8K, MATH-500 and AIME as JSONL), and check answers against them.

GSM8K      question, answer      the final answer follows #### at the end of a worked solution
MATH-500   problem, answer       LaTeX
AIME       problem, answer       an integer, as a number or a string
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import open_regular
from megatron_iwsft.utils.mathematics import import_math_verify
from megatron_iwsft.utils.text import without_surrogates

_PROMPT_FIELDS = ("question", "problem", "prompt")
_ANSWER_FIELDS = ("answer", "expected_answer", "solution")
_GSM8K_MARK = "####"


@dataclass(frozen=True)
class Problem:
    """number: line number in the file, from 1; answer: the expected answer, in a form that math-verify can parse."""

    number: int
    prompt: str
    answer: str


def read_benchmark(
    path: str | Path, *, prompt_field: str | None = None, answer_field: str | None = None, limit: int | None = None
) -> list[Problem]:
    """Read the first `limit` problems of a JSONL file. Raises DataError with the line number and the reason."""
    return _read(Path(path), prompt_field, answer_field, limit)


def read_prompts(path: str | Path) -> list[Problem]:
    """Like `read_benchmark`, but a line may have no answer; that of its problem is then empty."""
    return _read(Path(path), None, None, None, answers=False)


def _read(
    path: Path, prompt_field: str | None, answer_field: str | None, limit: int | None, *, answers: bool = True
) -> list[Problem]:
    if not path.is_file():
        raise DataError(f"the benchmark {path} does not exist. Check the path.")
    problems: list[Problem] = []
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(problems) == limit:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise DataError(f"{where} is not valid JSON: {error}. Correct or remove the line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} must be a JSON object; found {type(row).__name__}.")
            prompt = _field(row, prompt_field, _PROMPT_FIELDS, "prompt", where)
            if not answers and not any(name.lower() in _ANSWER_FIELDS for name in row):
                problems.append(Problem(number, prompt, ""))
                continue
            answer = expected_answer(_field(row, answer_field, _ANSWER_FIELDS, "answer", where))
            if not _read_expected(answer):
                raise DataError(
                    f"{where}: math-verify cannot parse an answer from {answer!r:.200}. "
                    "Correct the answer, or remove the line."
                )
            problems.append(Problem(number, prompt, answer))
    if not problems:
        raise DataError(f"the benchmark {path} contains no problems. Give a file with one problem per line.")
    return problems


def _field(row: dict[str, Any], given: str | None, known: tuple[str, ...], kind: str, where: str) -> str:
    by_name = {name.lower(): value for name, value in row.items()}
    for name in (given.lower(),) if given else known:
        value = by_name.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return without_surrogates(str(value))
    raise DataError(
        f"{where} has no {kind} field (looked for {given or ', '.join(known)}; found {', '.join(row):.200}). Set --{kind}-field."
    )


def expected_answer(text: str) -> str:
    r"""Extract the answer from a benchmark's answer field, as \boxed{...}, so that math-verify parses nothing else."""
    if _GSM8K_MARK in text:
        text = text.rsplit(_GSM8K_MARK, 1)[1]
    elif "\\boxed" in text:  # a worked solution
        return text
    return f"\\boxed{{{text.strip()}}}"


def read_answer(text: str) -> list[Any]:
    """Parse the answer in a text with math-verify: equivalent forms of it, or an empty list."""
    return import_math_verify().parse(text)


@lru_cache(maxsize=4096)  # the same for every sample of a problem, and for every model
def _read_expected(answer: str) -> list[Any]:
    return read_answer(answer)


def is_correct(answer: str, response: str) -> bool:
    """Whether a response is mathematically equal to `answer` (of a `Problem`), or is the same text, which need not be mathematics.

    Only the text after </think> is checked, and after the last #### where there is one. Unfinished thinking is wrong.
    """
    if "<think>" in response and "</think>" not in response:
        return False
    response = response.rsplit("</think>", 1)[-1]
    if _GSM8K_MARK in response:
        lines = response.rsplit(_GSM8K_MARK, 1)[1].strip().splitlines()
        response = lines[0] if lines else ""
    if f"\\boxed{{{response.strip()}}}" == answer:
        return True
    return bool(import_math_verify().verify(_read_expected(answer), read_answer(response)))
