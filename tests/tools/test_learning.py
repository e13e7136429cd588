"""The learning benchmark: the generated problems, and a smoke run of the command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_iwsft.data.prepare.arithmetic import short_sums
from tests.support import run_python


def test_short_sums_are_correct_except_for_the_requested_fraction() -> None:
    records = list(short_sums(2000, digits=3, wrong=0.5, seed=4))
    for record in records:
        a, b = (int(number[::-1]) for number in record["question"].rstrip("=").split("+"))
        assert int(record["answer"][::-1]) == a + b
        assert len(record["question"]) == 8 and len(record["response"]) == len(record["answer"]) == 4
        assert sum(x != y for x, y in zip(record["response"], record["answer"], strict=True)) <= 1
    wrong = sum(record["response"] != record["answer"] for record in records)
    assert 900 < wrong < 1100  # 4.5 standard deviations
    assert all(r["response"] == r["answer"] for r in short_sums(50, digits=2, wrong=0.0, seed=4))


def test_short_sums_exclude_held_out_problems() -> None:
    held_out = frozenset(r["question"] for r in short_sums(40, digits=1, wrong=0.0, seed=5))
    found = [r["question"] for r in short_sums(500, digits=1, wrong=0.0, seed=6, held_out=held_out)]
    assert len(found) == 500 and not held_out & set(found)


def bench(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_python("tools/bench/learning.py", "--output", output, *arguments, OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.command
def test_the_quick_benchmark_compares_every_objective(tmp_path: Path) -> None:
    """One filter, every objective: trained, exported and evaluated. A second run only prints the table."""
    output = tmp_path / "table"
    first = bench(output, "--quick")
    assert first.returncode == 0, first.stderr
    table = first.stdout[first.stdout.index("sampled / greedy accuracy") :]
    results = json.loads((output / "results.json").read_text())
    assert (output / "accuracy.svg").read_text().count("<svg") == 1

    runs = sorted(output.glob("seed-0/let-through-0.5-objective-*"))
    objectives = [yaml.safe_load((run / "config.yaml").read_text())["objective"] for run in runs]
    assert [(o["name"], o["level"], o["temperature"], o["normalize"]) for o in objectives] == [
        ("sft", "sequence", 1.0, "tokens"),
        ("iw_sft", "sequence", 1.0, "tokens"),
        ("iw_sft", "sequence", 4.0, "weights"),
        ("iw_sft", "token", 1.0, "tokens"),
        ("dft", "sequence", 1.0, "tokens"),
        ("psft", "sequence", 1.0, "tokens"),
    ]
    assert len(results) == 7 and results[0]["objective"] == "reference"
    questions = {
        name: {json.loads(line)["question"] for line in (output / f"{name}.jsonl").read_text().splitlines()}
        for name in ("problems", "demonstrations", "seed-0/prompts", "seed-0/let-through-0.5")
    }
    assert not questions["problems"] & (questions["demonstrations"] | questions["seed-0/prompts"])
    assert questions["seed-0/let-through-0.5"] <= questions["seed-0/prompts"]
    for run, result in zip(runs, results[1:], strict=True):
        assert f"| {result['objective']} |" in table
        assert list(run.glob("hf/step-*/model*.safetensors"))
        for how, temperature in (("sampled", 1), ("greedy", 0)):
            answers = output / "seed-0" / "answers" / f"problems-temperature-{temperature}" / f"{run.name}.jsonl"
            lines = [json.loads(line) for line in answers.read_text().splitlines()][1:]
            right = sum(line["answers"][0]["correct"] for line in lines)
            assert len(lines) == 16 and result[how] == right / 16

    second = bench(output, "--quick")
    assert second.returncode == 0, second.stderr
    assert second.stdout.endswith(table) and "steps of" not in second.stdout

    refused = bench(output)
    assert refused.returncode == 2 and "another size" in refused.stderr
