"""Run models on a benchmark: keep every answer, resume after an interruption, and compare models problem by problem.

OUTPUT/BENCHMARK/MODEL.jsonl    first line: model, weights fingerprint and settings; then one line per problem with all its answers.
                                After damage, the valid lines at its start are kept and the other problems answered again.
OUTPUT/BENCHMARK/summary.json   pass@k of every model, and the comparisons
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_iwsft.checkpoint.best import best_checkpoint
from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.evaluate.answers import FORMAT_VERSION, is_answers_line, read_answers
from megatron_iwsft.evaluate.benchmark import Problem, is_correct
from megatron_iwsft.evaluate.generate import Answer, Generator
from megatron_iwsft.evaluate.statistics import Comparison, Estimate, compare, mean_pass_at_k
from megatron_iwsft.utils.files import atomic_write, sampled_fingerprint, write_json
from megatron_iwsft.utils.hub import missing_directory
from megatron_iwsft.utils.jsonl import JsonLines
from megatron_iwsft.utils.locks import exclusive
from megatron_iwsft.utils.progress import progress
from megatron_iwsft.utils.text import printable_line, say


@dataclass(frozen=True)
class EvaluatedModel:
    """A Hugging Face directory, and its name in tables and file names."""

    label: str
    directory: Path


def find_models(paths: Sequence[str | Path], *, best: bool = False) -> list[EvaluatedModel]:
    """Find the models to evaluate. A run or checkpoint directory stands for its latest checkpoint, exported to RUN/hf/step-…; with
    `best`, a run for its best one (checkpoint.best).

    Raises CheckpointError if a path is neither that nor a Hugging Face directory, ConfigError if two models have the same name.
    """
    models = [_find_model(Path(path), best) for path in paths]
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"models are labelled by directory name, and these are not unique: {', '.join(labels)}. "
            "Rename one of the directories."
        )
    return models


def _find_model(given: Path, best: bool) -> EvaluatedModel:
    path = given.resolve()
    if (path / "config.json").exists():
        is_export = path.parent.name == "hf" and path.name.startswith("step-")
        return EvaluatedModel(f"{path.parent.parent.name}-{path.name}" if is_export else path.name, path)
    if not path.is_dir():
        raise CheckpointError(f"no model found at {given}: {missing_directory(given)}")
    info = CheckpointInfo.read(best_checkpoint(path) if best else path)
    root = info.directory.parent
    run = root.parent if root.name == CHECKPOINTS else root
    exported = run / "hf" / info.directory.name
    if not exported.exists():
        say(f"exporting {info.directory} to {exported}")
        export_checkpoint(info.directory, exported, exist_ok=True)
    return EvaluatedModel(f"{run.name}-{exported.name}", exported)


@dataclass(frozen=True)
class Result:
    """One model on one benchmark. correct[i]: correct answers to the i-th problem, out of `samples`; the rest are totals."""

    model: EvaluatedModel
    samples: int
    correct: list[int]
    cut_off: int
    tokens: int

    def pass_at(self, k: int) -> Estimate:
        return mean_pass_at_k(self.correct, self.samples, k)


def evaluate_model(
    model: EvaluatedModel,
    problems: list[Problem],
    output: Path,
    *,
    settings: dict[str, Any],
    samples: int,
    make: Callable[[Path], Generator],
) -> Result:
    """Answer the problems that `output`/LABEL.jsonl does not contain yet, and check all answers. A damaged file is repaired.

    settings: everything else that the answers depend on. `make` is called only if there are problems left.
    Raises DataError if the file was written with other settings, or another command is writing it.
    """
    path = output / f"{model.label}.jsonl"
    header = {
        "format_version": FORMAT_VERSION,
        "model": str(model.directory),
        "weights": sampled_fingerprint(model.directory, "*.safetensors"),
        "settings": settings,
    }
    output.mkdir(parents=True, exist_ok=True)
    with exclusive(output, DataError, name=path.name):  # another command would give the same answers again
        done = _all_answers(model, problems, path, header, samples=samples, make=make)
    answered = [done[problem.number]["answers"] for problem in problems]
    return Result(
        model,
        samples,
        correct=[sum(a["correct"] for a in own) for own in answered],
        cut_off=sum(a["cut_off"] for own in answered for a in own),
        tokens=sum(a["tokens"] for own in answered for a in own),
    )


def _all_answers(
    model: EvaluatedModel,
    problems: list[Problem],
    path: Path,
    header: dict[str, Any],
    *,
    samples: int,
    make: Callable[[Path], Generator],
) -> dict[int, dict[str, Any]]:
    """Those in the file at `path`, to which missing ones are added: problem number → its line."""
    results = JsonLines(path, partial(say, error=True), valid=lambda i, row: is_answers_line(i, row, samples))
    done = _earlier_results(results, header)
    for problem in problems:
        if problem.number in done and done[problem.number]["answer"] != problem.answer:
            raise DataError(f"{path} has answers to another problem in line {problem.number}. Choose another --output.")
    left = [problem for problem in problems if problem.number not in done]
    if left:
        generator = make(model.directory)
        label = printable_line(model.label)
        say(f"{label} answers {len(left):,} problems, {generator.problems_at_once} at once", error=True)
        with progress(None, label, unit="problems", total=len(problems), done=len(problems) - len(left)) as bar:
            for batch in _answer(left, generator, results, header):
                done |= batch
                bar.update(len(batch))
    return done


def _answer(
    problems: list[Problem], generator: Generator, results: JsonLines, header: dict[str, Any]
) -> Iterator[dict[int, dict[str, Any]]]:
    """Answer and check problems batch by batch, append them to the file, and yield each batch as problem number → its line."""
    if not results.read():
        results.append(header | {"backend": generator.backend})
    for at in range(0, len(problems), generator.problems_at_once):
        batch = problems[at : at + generator.problems_at_once]
        answers = generator.answer([(problem.number, problem.prompt) for problem in batch])
        done = {}
        for problem, own in zip(batch, answers, strict=True):
            judged = [judged_answer(problem, answer) for answer in own]
            done[problem.number] = asdict(problem) | {"answers": judged}
        results.append(*done.values(), durable=True)
        yield done


def judged_answer(problem: Problem, answer: Answer) -> dict[str, Any]:
    """An answer as it is stored. correct: None for a prompt without an expected answer."""
    row = {"text": answer.text, "tokens": answer.tokens, "cut_off": answer.cut_off}
    return row | {"correct": is_correct(problem.answer, answer.text) if problem.answer else None}


def _earlier_results(results: JsonLines, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The finished problems of an earlier call: problem number → its line."""
    before, *lines = results.read() or [header]
    for key in ("format_version", "weights", "settings"):
        if before[key] != header[key]:
            raise DataError(
                f"{results.path} was written with different {key}: {before[key]} there, {header[key]} now. Remove it, or choose another "
                "--output."
            )
    return {line["number"]: line for line in lines}


def write_records(path: Path, output: Path, models: Sequence[EvaluatedModel]) -> int:
    """Write the stored answers in `output` as records for `iwsft shard`, one per answer; returns their number.

    A record: id, prompt, response, answer (the expected one), correct, cut_off. Models' own samples, once filtered, are what iw-SFT is for.
    """
    count = 0
    with atomic_write(path) as file:
        for model in models:
            _, problems = read_answers(output / f"{model.label}.jsonl") or ({}, {})
            for number, problem in sorted(problems.items()):
                for k, answer in enumerate(problem["answers"]):
                    record = {"id": f"{model.label}-{number}-{k}", "number": number, "prompt": problem["prompt"]}
                    record |= {"response": answer["text"], "answer": problem["answer"]}
                    record |= {key: answer[key] for key in ("correct", "cut_off")}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += 1
    return count


def pairs(results: Sequence[Result]) -> list[tuple[Result, Result, Comparison]]:
    """Compare every model with the first."""
    first = results[0]
    return [(first, r, compare(first.correct, r.correct, (first.samples, r.samples))) for r in results[1:]]


def table(results: Sequence[Result], ks: Sequence[int]) -> str:
    """Format the results as a text table."""
    names = {r.model.label: printable_line(r.model.label) for r in results}
    width = max(map(len, names.values()))
    lines = [f"{'':{width}}  " + "".join(f"{f'pass@{k}':^26}" for k in ks) + "cut off  tokens/answer"]
    for r in results:
        answers = len(r.correct) * r.samples
        cells = "".join(f"{_percent(r.pass_at(k)):^26}" for k in ks)
        lines.append(
            f"{names[r.model.label]:{width}}  {cells}{r.cut_off / answers:6.1%}  {r.tokens / answers:12.0f}".rstrip()
        )
    for a, b, c in pairs(results):
        lines.append(
            f"{names[b.model.label]} − {names[a.model.label]}: pass@1 {100 * c.difference:+.1f} points "
            f"[{100 * c.low:+.1f}, {100 * c.high:+.1f}], exact paired test p = {c.p_value:.3g} "
            f"({c.better} problems better, {c.worse} worse, {c.equal} equal)"
        )
    return "\n".join(lines)


def _percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def write_summary(path: Path, results: Sequence[Result], ks: Sequence[int], settings: dict[str, Any]) -> None:
    """Write pass@k of every model and the comparisons as JSON."""
    summary = {
        "settings": settings,
        "problems": len(results[0].correct),
        "models": {
            r.model.label: {"directory": str(r.model.directory), "cut_off": r.cut_off, "tokens": r.tokens}
            | {f"pass@{k}": asdict(r.pass_at(k)) for k in ks}
            for r in results
        },
        "comparisons": [{"from": a.model.label, "to": b.model.label} | asdict(c) for a, b, c in pairs(results)],
    }
    write_json(path, summary)
