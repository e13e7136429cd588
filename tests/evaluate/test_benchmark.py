"""Benchmark files in their several formats, and the judging of answers."""

from __future__ import annotations

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
def test_formats(name: str, tmp_path: Path) -> None:
    row, right, wrong = FORMATS[name]
    (problem,) = read_benchmark(tiny.write_jsonl(tmp_path / "b.jsonl", [row]))
    assert (problem.number, problem.prompt) == (1, "q")
    assert is_correct(problem.answer, right)
    assert not is_correct(problem.answer, wrong)


def test_judging() -> None:
    answer = expected_answer("18")
    for right in (
        "16 - 3 - 4 = <<16-3-4=9>>9\n9 * 2 = 18\n#### 18",
        "#### $18.00\nQuestion: what is 3 + 4?",
        "<think>is it 9? or \\boxed{7}?</think> \\boxed{18}",
        "She earns \\$18 a day. **18**",
    ):
        assert is_correct(answer, right), right
    for wrong in (
        "",
        "####",
        "18 of them\n#### 9",
        "<think>it must be \\boxed{18}, or",
        "<think>18</think> \\boxed{19}",
    ):
        assert not is_correct(answer, wrong), wrong
    assert is_correct(expected_answer("(3, \\frac{\\pi}{2})"), "in polar form: $\\boxed{\\left(3,\\pi/2\\right)}$")
    assert not is_correct(expected_answer("(3, \\frac{\\pi}{2})"), "$\\boxed{\\left(\\pi/2,3\\right)}$")


def test_fields_limit_and_mistakes(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"q": "one", "target": 1}, {"q": "two", "target": 2}])
    named = read_benchmark(path, prompt_field="q", answer_field="target", limit=1)
    assert [(p.number, p.prompt) for p in named] == [(1, "one")]
    with pytest.raises(DataError, match="line 1 has no prompt under question, problem, prompt; it has q, target"):
        read_benchmark(path)
    with pytest.raises(DataError, match="line 1 has no answer under result"):
        read_benchmark(path, prompt_field="q", answer_field="result")
    for content, message in (
        ("", "holds no problems"),
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2 must be a JSON object"),
        ('{"question": "q", "answer": "####"}', "finds no answer"),
        ('{"question": "q", "answer": true}', "has no answer"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_benchmark(path)
    with pytest.raises(DataError, match="does not exist"):
        read_benchmark(tmp_path / "nothing")
