"""Held-out results of runs: answers that `iwsft evaluate` has stored, compared problem by problem, and what they say about the runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_iwsft.evaluate.answers import read_answers
from megatron_iwsft.evaluate.statistics import Comparison, Estimate, compare, mean_pass_at_k
from megatron_iwsft.report.run_record import RunRecord, finite
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.text import printable_line

_NOISE = 0.05  # of the exact paired test
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class ModelAnswers:
    """One model's answers to a benchmark.

    name      the run's name, or the model's own label if it belongs to none of the runs
    run       index of its run; None for another model, such as the base model
    step      of the exported checkpoint; 0 if that is not known
    problems  number → the problem's line: prompt, answer, answers with text and correct
    """

    name: str
    run: int | None
    step: int
    settings: dict[str, Any]
    problems: dict[int, dict[str, Any]]

    @property
    def samples(self) -> int:
        return len(next(iter(self.problems.values()))["answers"])

    def correct(self, numbers: Iterable[int]) -> list[int]:
        """The number of correct answers to each of these problems."""
        return [sum(answer["correct"] for answer in self.problems[number]["answers"]) for number in numbers]

    @property
    def estimate(self) -> Estimate:
        """pass@1 with its 95 % interval."""
        return mean_pass_at_k(self.correct(self.problems), self.samples, 1)


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's models, at most one per run and with it what else was evaluated there; the runs in order, other models first.

    All have answered the same problems: what only some have answered is left out. earlier: of the runs' checkpoints, on these problems.
    """

    name: str
    models: list[ModelAnswers]
    earlier: list[ModelAnswers]

    @property
    def numbers(self) -> list[int]:
        """The problems that every model has answered."""
        return sorted(self.models[0].problems)

    @property
    def best(self) -> ModelAnswers:
        return max(self.models, key=lambda model: model.estimate.mean)

    @property
    def settings(self) -> str:
        s = self.models[0].settings
        temperature, samples = finite(s.get("temperature")), self.models[0].samples
        how = f"sampled at temperature {temperature:g}" if temperature else "greedy"
        return f"{samples} answer{'s' * (samples > 1)} per problem, {how}"

    def against(self, other: ModelAnswers, model: ModelAnswers) -> Comparison:
        """`model` compared with `other`, on the problems that all models have answered."""
        numbers = self.numbers
        return compare(other.correct(numbers), model.correct(numbers), (other.samples, model.samples))

    def sentences(self) -> list[str]:
        """The verdict: the best model against every other, and whether the difference is more than noise."""
        best, out = self.best, []
        right = f"{best.name} answers {100 * best.estimate.mean:.1f} % right"
        for other in sorted(self.models, key=lambda model: -model.estimate.mean):
            if other is best:
                continue
            c = self.against(other, best)
            points = f"{100 * c.difference:+.1f} points [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
            than = f"{right}, {other.name} {100 * other.estimate.mean:.1f} %: {points}."
            if c.p_value < _NOISE:
                out.append(f"{than} This is not noise: p {_p(c.p_value)} in an exact paired test.")
            else:
                out.append(f"{than} This may be noise: p {_p(c.p_value)}; more problems or other seeds would tell.")
        return out or [f"{best.name} answers {percent(best.estimate)} right."]


def _p(value: float) -> str:
    return "< 1e-12" if value < 1e-12 else f"= {value:.2g}"


def percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def find_benchmarks(runs: Sequence[RunRecord], directories: Sequence[Path] | None = None) -> list[BenchmarkResult]:
    """Benchmarks on which at least one of the runs was evaluated, by name.

    directories: outputs of `iwsft evaluate`; by default `evaluation` in and beside each run, and in the working directory.
    """
    if directories is None:
        nearby = [
            p for run in runs for p in (run.directory / "evaluation", run.directory.resolve().parent / "evaluation")
        ]
        directories = [*nearby, Path("evaluation")]
    folders = {folder.resolve(): folder.name for d in directories for folder in sorted(d.glob("*")) if folder.is_dir()}
    named: list[tuple[str, list[ModelAnswers]]] = []
    for folder, name in folders.items():
        models = [model for path in sorted(folder.glob("*.jsonl")) if (model := _read_model(path, runs)) is not None]
        same = next((others for known, others in named if known == name and _of_same_problems(others, models)), None)
        if same is None:
            named.append((name, models))
        else:  # each run has a folder of its own for what it evaluated while it trained
            same += models
    found = (_benchmark(printable_line(name), models) for name, models in named)
    return sorted((result for result in found if result is not None), key=lambda result: result.name)


def _of_same_problems(some: Sequence[ModelAnswers], others: Sequence[ModelAnswers]) -> bool:
    """Whether both answered problems of one benchmark: problems of the same number are the same."""
    if not some or not others:
        return False
    a, b = some[0].problems, others[0].problems
    shared = a.keys() & b.keys()
    return bool(shared) and all(a[n].get(key) == b[n].get(key) for n in shared for key in ("prompt", "answer"))


def _benchmark(name: str, models: Sequence[ModelAnswers]) -> BenchmarkResult | None:
    newest: dict[str, ModelAnswers] = {}
    for model in models:
        key = f"run {model.run}" if model.run is not None else f"model {model.name}"
        newest[key] = max(newest.get(key, model), model, key=lambda m: m.step)
    shown = sorted(newest.values(), key=lambda m: -1 if m.run is None else m.run)
    of_runs = [model for model in shown if model.run is not None]
    if not of_runs:
        return None
    # Answers that were sampled in another way cannot be compared problem by problem.
    shown = [model for model in shown if model.settings == of_runs[0].settings]
    common = set.intersection(*(set(model.problems) for model in shown))
    if not common:
        return None
    earlier = [
        m for m in models if m.run is not None and m.settings == of_runs[0].settings and common & set(m.problems)
    ]
    return BenchmarkResult(name, [_only(m, common) for m in shown], [_only(m, common) for m in earlier])


def _only(model: ModelAnswers, numbers: set[int]) -> ModelAnswers:
    """A model's answers to these problems: shares, differences and their tests are of the same ones."""
    return replace(model, problems={n: problem for n, problem in model.problems.items() if n in numbers})


def _read_model(path: Path, runs: Sequence[RunRecord]) -> ModelAnswers | None:
    try:
        read = read_answers(path) if is_regular_file(path) else None
    except OSError:
        return None
    if read is None:
        return None
    header, problems = read
    directory = Path(str(header.get("model", "")))
    for index, run in enumerate(runs):
        if run.directory.resolve() in directory.parents:
            step = _STEP.fullmatch(directory.name)
            return ModelAnswers(run.name, index, int(step[1]) if step else 0, header["settings"], problems)
    return ModelAnswers(printable_line(path.stem), None, 0, header["settings"], problems)


@dataclass(frozen=True)
class ShownProblem:
    """A problem with one answer of each model. answers: (model, text, whether correct)."""

    prompt: str
    expected: str
    answers: list[tuple[str, str, bool]]


def shown_problems(benchmark: BenchmarkResult, count: int = 6) -> list[ShownProblem]:
    """Problems to read: those first whose answers differ in correctness between models, in the benchmark's order."""
    numbers = benchmark.numbers
    differing = [n for n in numbers if len({bool(m.correct([n])[0]) for m in benchmark.models}) > 1]
    chosen = [*differing, *(n for n in numbers if n not in set(differing))][:count]
    return [_shown(benchmark.models, number) for number in sorted(chosen)]


def _shown(models: Sequence[ModelAnswers], number: int) -> ShownProblem:
    line = models[0].problems[number]
    expected = str(line["answer"]).removeprefix("\\boxed{").removesuffix("}")
    answers = [(m.name, m.problems[number]["answers"][0]) for m in models]
    return ShownProblem(str(line.get("prompt", "")), expected, [(name, a["text"], a["correct"]) for name, a in answers])
