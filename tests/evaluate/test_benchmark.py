"""Reading benchmark files and checking answers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megatron_iwsft.errors import DataError
from megatron_iwsft.evaluate.benchmark import expected_answer, is_correct, read_benchmark
from tests.support import tiny

FORMATS = {
    "gsm8k": ({"question": "q", "answer": "1,000 * 2 = <<1000*2=2000>>2000\n#### 2,000"}, "It is 2000.", "It is 1000."),
    "math": (
        {"problem": "q", "solution": "so $\\boxed{1}$", "answer": "\\frac{\\pi}{2}", "unique_id": "test/1"},
        "\\boxed{\\dfrac{1}{2}\\pi}",
        "\\boxed{\\frac{1}{2}}",
    ),
    "solution only": ({"problem": "q", "solution": "Thus $1 + 1 = \\boxed{2}$."}, "the answer is $2$", "$1$"),
    "aime": ({"problem": "q", "answer": 73}, "Therefore \\boxed{073}", "\\boxed{37}"),
    "aime, as text": ({"ID": "2024-I-1", "Problem": "q", "Answer": "073"}, "so the answer is 73.", "I do not know."),
}


@pytest.mark.parametrize("name", FORMATS)
def test_reads_a_format_and_checks_its_answers(name: str, tmp_path: Path) -> None:
    row, right, wrong = FORMATS[name]
    (problem,) = read_benchmark(tiny.write_jsonl(tmp_path / "b.jsonl", [row]))
    assert (problem.number, problem.prompt) == (1, "q")
    assert is_correct(problem.answer, right)
    assert not is_correct(problem.answer, wrong)


PAIR = "(3, \\frac{\\pi}{2})"


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("18", "16 - 3 - 4 = <<16-3-4=9>>9\n9 * 2 = 18\n#### 18"),
        ("18", "#### $18.00\nQuestion: what is 3 + 4?"),
        ("18", "<think>is it 9? or \\boxed{7}?</think> \\boxed{18}"),
        ("18", "She earns \\$18 a day. **18**"),
        (PAIR, "in polar form: $\\boxed{\\left(3,\\pi/2\\right)}$"),
        ("e14850d14990", "<think>add</think> e14850d14990"),
    ],
    ids=["gsm8k", "text after the answer", "after thinking", "plain text", "pair", "no mathematics"],
)
def test_correct_responses(answer: str, response: str) -> None:
    assert is_correct(expected_answer(answer), response)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("18", ""),
        ("18", "####"),
        ("18", "18 of them\n#### 9"),
        ("18", "<think>it must be \\boxed{18}, or"),
        ("18", "<think>18</think> \\boxed{19}"),
        (PAIR, "$\\boxed{\\left(\\pi/2,3\\right)}$"),
        ("e14850d14990", "e14850d14991"),
    ],
    ids=[
        "empty",
        "mark only",
        "other answer after the mark",
        "unfinished thinking",
        "other answer after thinking",
        "swapped pair",
        "no mathematics",
    ],
)
def test_wrong_responses(answer: str, response: str) -> None:
    assert not is_correct(expected_answer(answer), response)


def test_named_fields_and_limit(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"q": "one", "target": 1}, {"q": "two", "target": 2}])
    named = read_benchmark(path, prompt_field="q", answer_field="target", limit=1)
    assert [(p.number, p.prompt) for p in named] == [(1, "one")]


def test_a_missing_field_is_reported(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"q": "one", "target": 1}])
    with pytest.raises(
        DataError, match=r"line 1 has no prompt field \(looked for question, problem, prompt; found q, target\)"
    ):
        read_benchmark(path)
    with pytest.raises(DataError, match=r"line 1 has no answer field \(looked for result; found q, target\)"):
        read_benchmark(path, prompt_field="q", answer_field="result")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no problems"),
        ("{", "line 1 is not valid JSON"),
        ("\n[1]", "line 2 must be a JSON object"),
        ('{"question": "q", "answer": "####"}', "cannot parse an answer"),
        ('{"question": "q", "answer": true}', "has no answer field"),
    ],
    ids=["empty file", "not JSON", "not an object", "empty answer", "boolean answer"],
)
def test_invalid_files_are_rejected(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_benchmark(tmp_path / "b.jsonl")


def test_a_text_that_cannot_be_parsed_is_quoted_in_part_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "\\boxed" + "?" * 10_000}])
    with pytest.raises(DataError, match="cannot parse an answer") as raised:
        read_benchmark(path)
    assert len(str(raised.value)) < 500
    logging.getLogger("math_verify.parser").warning("Timeout during parsing: \x1b[2J")
    assert caplog.text == ""


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_benchmark(tmp_path / "nothing")
