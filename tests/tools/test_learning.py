"""The learning benchmark: the generated problems, and a smoke run of the command."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.arithmetic import short_sums
from megatron_iwsft.objectives.functions import Settings, Trajectories, iw_sft, local_segment_sum
from tests.support import ROOT, run_python


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
    """One experiment with its controls: rates tried, trained, exported and evaluated. A second run only prints the table."""
    output = tmp_path / "table"
    first = bench(output, "--quick")
    assert first.returncode == 0, first.stderr
    table = first.stdout[first.stdout.index("sums, reference wrong by conviction") : first.stdout.index("\n\n/")]
    (panel,) = json.loads((output / "results.json").read_text())
    assert ElementTree.parse(output / "accuracy.svg").getroot().tag.endswith("svg")
    minutes = re.search(r"CPU minutes, with all processes: (\S+); .*: \{'sums': (\S+)\}", first.stdout)
    assert minutes and 0 < float(minutes[2]) <= float(minutes[1])  # which counts the start of the processes too

    home = output / "sums" / "reference-conviction-0.5-16x1-tp2"
    development = "reference-conviction-0.5-16x1/seed-0"
    tried, reported = panel["tried"], panel["results"]
    assert [(r["seed"], len(found)) for found in (tried, reported) for r in found[:1]] == [(0, 2 * 7), (1, 7 + 3)]
    for result in reported[:7]:
        rivals = [r for r in tried if r["objective"] == result["objective"]]
        assert result["lr"] == max(rivals, key=lambda r: r["exact"])["lr"]
    assert {r["lr"] for r in reported[7:]} == {
        next(r["lr"] for r in reported if r["objective"] == "trajectory, clip [0.2, 5]")
    }
    names = ["SFT", "sequence-tau-1", "sequence-tau-T", "trajectory-clip-0.2-5", "token", "DFT", "PSFT"]
    names += [f"trajectory-{x}" for x in ("neighbour-s-weight", "batch-s-mean-weight", "reference-refreshed")]
    runs = [run for name in names for run in (home / "seed-1").glob(f"{name}-lr-*")]
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    objectives = [config["objective"] for config in configs]
    trained = float(np.median(Corpus.open(home / "seed-1" / "curated").num_trained))
    assert [(o["name"], o["level"], o["temperature"], o["normalize"]) for o in objectives] == [
        ("sft", "sequence", 1.0, "tokens"),
        ("iw_sft", "sequence", 1.0, "sequence_weights"),
        ("iw_sft", "sequence", trained, "sequence_weights"),
        ("iw_sft", "trajectory", 1.0, "sequence_weights"),
        ("iw_sft", "token", 1.0, "tokens"),
        ("dft", "sequence", 1.0, "tokens"),
        ("psft", "sequence", 1.0, "tokens"),
        ("iw_sft_of_the_neighbour", "trajectory", 1.0, "sequence_weights"),
        ("iw_sft_mean", "trajectory", 1.0, "sequences"),
        ("iw_sft", "trajectory", 1.0, "sequence_weights"),
    ]
    assert configs[-1]["reference"]["refresh"] == 10
    assert all(config["parallel"]["tensor"] == 2 for config in configs)

    questions = {
        name: {json.loads(line)["question"] for line in (home.parent / f"{name}.jsonl").read_text().splitlines()}
        for name in (
            *("problems", "development", "reference-random-demonstrations", "reference-conviction-demonstrations"),
            *(f"{home.name}/seed-1/curated", f"{development}/curated"),
        )
    }
    problems = questions.pop("problems")
    assert all(not problems & seen for seen in questions.values())
    assert not questions["development"] & questions[f"{development}/curated"]
    for run, result in zip(runs, reported, strict=True):
        assert f"| {result['objective']} |" in table
        answers = home / "seed-1" / "answers" / f"{run.name}.jsonl"
        lines = [json.loads(line) for line in answers.read_text().splitlines()][1:]
        assert len(lines) == 16 and result["greedy"] == sum(line["answers"][0]["correct"] for line in lines) / 16
        assert 0 < result["exact"] < 1 and ("ess" in result) == (result["objective"] != "SFT")

    second = bench(output, "--quick")
    assert second.returncode == 0, second.stderr
    assert table in second.stdout and "steps of" not in second.stdout

    refused = bench(output)
    assert refused.returncode == 2 and "another size" in refused.stderr


def test_controls_keep_the_weights_but_not_whose_they_are(stages: ModuleType) -> None:
    lengths = torch.tensor([2.0, 1.0, 3.0, 0.0])
    segment = torch.repeat_interleave(torch.arange(4), torch.tensor([2, 1, 3, 2]))
    mask = (segment < 3).float()
    logprobs = -torch.rand(8, generator=torch.Generator().manual_seed(0)) * mask
    t = Trajectories(
        logprobs=logprobs,
        proposal=logprobs,
        reference=(logprobs - torch.tensor([0.1, 0.2, -0.3, 0.0])[segment]) * mask,
        mask=mask,
        segment=segment,
        lengths=lengths,
        quality=torch.ones(4),
        segment_sum=local_segment_sum(segment, 4),
    )
    settings = Settings("trajectory")
    own = iw_sft.function(t, settings).weight[[0, 2, 3]]
    assert own.tolist() == pytest.approx([math.exp(x) for x in (0.2, 0.2, -0.9)])
    found = {name: control.function(t, settings) for name, control in stages.controls().items()}
    assert found["iw_sft_of_the_neighbour"].weight[[0, 2, 3]].tolist() == pytest.approx(own.roll(1).tolist())
    mean = found["iw_sft_mean"]
    assert mean.weight.tolist() == pytest.approx((mask * own.mean()).tolist())
    assert mean.loss.tolist() == pytest.approx((-mean.weight * logprobs).tolist())


def test_the_wrong_strategy_does_not_carry(tasks: ModuleType) -> None:
    assert tasks.Sums().without_carrying("740+285=") == "9250"  # 47 + 582 = 629: without the carry 529
    assert tasks.Chains().without_carrying("c85740=") == "c85590b85340a85190"  # 47 + 58 → 95, 43, 91


def test_chains_are_correct_except_for_the_requested_fraction(tasks: ModuleType) -> None:
    task = tasks.Chains()
    records = list(task.problems(500, seed=3, wrong=0.3))
    lengths = set()
    for record in records:
        steps = [record["answer"][i : i + 6] for i in range(0, len(record["answer"]), 6)]
        additions, number, total = (
            ord(record["question"][0]) - ord("a") + 1,
            record["question"][1:3],
            record["question"][3:6],
        )
        lengths.add(len(steps))
        assert [step[0] for step in steps] == [chr(ord("a") + i) for i in reversed(range(additions))]
        for step in steps:
            total = f"{int(total[::-1]) + int(number[::-1]):03d}"[::-1]
            assert step[1:] == number + total
        assert sum(x != y for x, y in zip(record["response"], record["answer"], strict=True)) <= 1
    assert lengths == set(range(4, 10))
    wrong = sum(r["response"] != r["answer"] for r in records)
    assert 109 < wrong < 191  # 4 standard deviations
    held_out = frozenset(r["question"] for r in records[:100])
    assert not held_out & {r["question"] for r in task.problems(500, seed=3, held_out=held_out)}


def test_lessons_are_wrong_most_of_the_time_or_need_no_carry(tasks: ModuleType) -> None:
    for task in (tasks.Sums(), tasks.Chains()):
        lessons = list(task.lessons(300, seed=1, held_out=frozenset()))
        wrong = [r for r in lessons if r["response"] != r["answer"]]
        assert all(r["response"] == task.without_carrying(r["question"]) for r in wrong)
        assert 140 < len(wrong) < 230  # 0.67 at most: some sums need no carry

    task = tasks.SumsThatCarry()
    for records, carries in (
        (task.problems(200, seed=1), True),
        (task.lessons(200, seed=1, held_out=frozenset()), False),
    ):
        for record in records:
            a, b = (int(number) for number in record["question"].rstrip(" =").split(" + "))
            assert record["response"] == record["answer"] == str(a + b)
            assert (a % 10 + b % 10 >= 10) == carries


def test_the_table_has_spreads_and_differences_paired_by_seed(tables: ModuleType) -> None:
    def result(objective: str, seed: int, exact: float, **more: float) -> dict:
        facts = {"objective": objective, "seed": seed, "lr": 1e-3, "right": 0.5}
        return {**facts, "exact": exact, "cool": exact, "greedy": 1.0, **more}

    results = [result("SFT", s, 0.1 * s) for s in (1, 2, 3)]
    results += [result("DFT", s, 0.1 * s + 0.2, ess=0.5) for s in (3, 2, 1)]
    reference = {"exact": 0.3, "cool": 0.4, "greedy": 0.5}
    found = tables.table("Title", reference, results)
    assert found.splitlines()[0] == "Title; 50.0 % of what is trained on is right; 3 seeds."
    assert "| SFT | 0.001 | 20.0 ± 10.0 | 20.0 ± 10.0 | 100.0 ± 0.0 |  |  |" in found
    assert "| DFT | 0.001 | 40.0 ± 10.0 | 40.0 ± 10.0 | 100.0 ± 0.0 | +20.0 ± 0.0 | 0.50 |" in found
    assert tables.difference([0.1, 0.2, 0.3]) == f"+20.0 ± {4.303 * 10 / math.sqrt(3):.1f}"

    drawing = ElementTree.fromstring(tables.figure([{"title": "A < B", "reference": reference, "results": results}]))
    circles = [float(c.get("cx")) for c in drawing.iter("{http://www.w3.org/2000/svg}circle")][2:]
    assert circles == [250 + 4 * x for x in (20, 100, 40, 100)]  # exact and greedy of SFT, then of DFT


@pytest.mark.command
def test_several_learning_rates_are_refused_where_none_is_chosen(tmp_path: Path) -> None:
    for experiments, named in ((["2"], "experiments 2 use"), (["1", "6"], "experiments 6 use")):
        done = bench(tmp_path, "--experiments", *experiments, "--lr", "1e-3", "5e-4")
        assert done.returncode == 2 and named in done.stderr and not any(tmp_path.iterdir())


def test_results_are_replaced_by_the_same_rows_at_the_same_rates(command: ModuleType) -> None:
    def panel(title: str, *results: tuple[str, float, int]) -> dict:
        return {"title": title, "results": [{"objective": o, "lr": lr, "seed": seed} for o, lr, seed in results]}

    first = command.what_ran(panel("A", ("SFT", 1e-3, 1), ("DFT", 2e-4, 1)))
    assert first == command.what_ran(panel("A", ("DFT", 2e-4, 1), ("SFT", 1e-3, 1), ("SFT", 1e-3, 2)))
    others = [panel("B", ("SFT", 1e-3, 1), ("DFT", 2e-4, 1)), panel("A", ("SFT", 1e-3, 1))]
    others.append(panel("A", ("SFT", 5e-4, 1), ("DFT", 2e-4, 1)))
    assert len({first, *map(command.what_ran, others)}) == 4


def test_the_experiments_have_four_seeds_and_chains_both_normalisations(command: ModuleType) -> None:
    experiments = command.EXPERIMENTS
    assert [experiments[i].seeds for i in (0, 1, 2, 3, 5)] == [4] * 5
    assert {"SFT", "SFT, normalize: sequences", "DFT", "PSFT"} <= set(experiments[5].objectives)
    assert command.objectives(40.0)["SFT, normalize: sequences"] == {
        "objective": {"name": "sft", "normalize": "sequences"}
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("learning")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("learning_tasks")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("learning_table")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    return importlib.import_module("learning_stages")
