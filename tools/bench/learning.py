"""Accuracy of every objective after training on curated answers, by quality of the curation: tools/bench/learning.py [--output DIR]

Uses the project's trainer, exporter and evaluation. A small model, the reference, learns sums of two three-digit numbers from
demonstrations of which half are wrong. For each seed, it answers new problems, sampled at temperature 1; a filter keeps the correct
answers and a fraction of the wrong ones. The reference is then trained on the kept answers with each objective, all else equal,
exported, and evaluated on held-out problems. The seed determines which problems are answered, which wrong answers are kept, and the
training order; the reference and the held-out problems are the same for all seeds.

Prints a table of accuracies, mean ± standard deviation over seeds, and writes results.json and accuracy.svg. Running the same command
again resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import run_command
from megatron_iwsft.utils.files import write_text

OBJECTIVES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "iw-SFT, sequence, τ = 1": {"name": "iw_sft"},
    "iw-SFT, sequence, τ = 4, by weights": {"name": "iw_sft", "temperature": 4.0, "normalize": "weights"},
    "iw-SFT, token": {"name": "iw_sft", "level": "token"},
    "DFT": {"name": "dft"},
    "PSFT": {"name": "psft"},
}
TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
_SEQ_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """Sizes of one table. Batches are in packed sequences of 256 tokens. prompts: problems that the reference answers; curated: answers
    that are trained on."""

    digits: int = 3
    wrong: float = 0.5
    hidden_size: int = 96
    reference_steps: int = 1000
    reference_batch: int = 8
    reference_lr: float = 3e-3
    prompts: int = 2400
    curated: int = 800
    tuning_steps: int = 100
    tuning_batch: int = 4
    tuning_lr: float = 5e-4
    problems: int = 400


QUICK = Size(
    digits=2, hidden_size=32, reference_steps=10, reference_batch=2, prompts=64, curated=16, tuning_steps=2, problems=16
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--let-through",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5],
        metavar="FRACTION",
        help="fractions of the wrong answers that the filters keep, one filter each (default: %(default)s)",
    )
    parser.add_argument(
        "--reference-steps",
        type=int,
        default=Size.reference_steps,
        help="training steps of the reference; with fewer, it is wrong rather than uncertain (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=Size.prompts,
        help=f"problems that the reference answers; {Size.curated} answers are kept (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, one filter, almost no training")
    args = parser.parse_args()
    if min(args.seeds, args.reference_steps, args.prompts) < 1:
        parser.error("--seeds, --reference-steps and --prompts must be at least 1")
    if not all(0 <= share <= 1 for share in args.let_through):
        parser.error("--let-through must be between 0 and 1")
    size = Size(reference_steps=args.reference_steps, prompts=args.prompts)
    size, seeds, shares = (QUICK, 1, [0.5]) if args.quick else (size, args.seeds, sorted(set(args.let_through)))

    from megatron_iwsft.distributed.context import stop
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    check_output(args.output, size)
    results = bench(args.output, size, range(seeds), shares)
    stop()
    write(args.output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    plot(results, args.output / "accuracy.svg")
    print(table(results))
    print(f"\n{args.output}/results.json, {args.output}/accuracy.svg")


def check_output(output: Path, size: Size) -> None:
    """Raise DataError if `output` holds runs of another size."""
    path, settings = output / "size.json", asdict(size)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise DataError(f"{output} has results of another size. Remove it, or choose another --output.")
    write(path, json.dumps(settings, indent=1) + "\n")


def bench(output: Path, size: Size, seeds: Iterable[int], shares: list[float]) -> list[dict[str, Any]]:
    """Train and evaluate the reference, then every objective with every filter and seed."""
    from megatron_iwsft.data.prepare.arithmetic import short_sums

    benchmark = output / "problems.jsonl"
    problems = list(short_sums(size.problems, digits=size.digits, wrong=0.0, seed=1))
    write(benchmark, lines(problems))
    held_out = frozenset(problem["question"] for problem in problems)
    reference = train_reference(output, size, held_out)
    results: list[dict[str, Any]] = [{"objective": "reference", **accuracy(reference, "reference", benchmark, output)}]
    for seed in seeds:
        home = output / f"seed-{seed}"
        prompts = home / "prompts.jsonl"
        sums = short_sums(size.prompts, digits=size.digits, wrong=0.0, seed=2 + seed, held_out=held_out)
        write(prompts, lines(sums))
        answers = ask(reference, "reference", prompts, home, temperature=1.0)
        for share in shares:
            kept = curate(answers, share, size.curated, seed)
            corpus = shard(home / f"let-through-{share:g}.jsonl", kept, output / "tokenizer")
            facts = {"seed": seed, "let_through": share, "right": sum(r["correct"] for r in kept) / len(kept)}
            for number, objective in enumerate(OBJECTIVES):
                label = f"{corpus.name}-objective-{number}"
                exported = tune(home / label, output / "reference", corpus, OBJECTIVES[objective], size, seed)
                results.append({**facts, "objective": objective, **accuracy(exported, label, benchmark, home)})
                print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    return results


def train_reference(output: Path, size: Size, held_out: frozenset[str]) -> Path:
    """Train a two-layer model from random weights, on each demonstration once; returns its export."""
    from megatron_iwsft.data.prepare.arithmetic import short_sums
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    # With the words of the template, a sum of n digits has 3 n + 11 tokens.
    demonstrations = size.reference_steps * size.reference_batch * (_SEQ_LENGTH // (3 * size.digits + 11))
    records = list(short_sums(demonstrations, digits=size.digits, wrong=size.wrong, seed=0, held_out=held_out))
    # Include the words of the template, so that each is one or two tokens.
    texts = ({"text": f"Question: {r['question']}\nAnswer: {r['response']}"} for r in records[:200])
    write(output / "texts.jsonl", lines(texts))
    train_tokenizer([output / "texts.jsonl"], output / "tokenizer", fields=["text"], vocab_size=300)
    corpus = shard(output / "demonstrations.jsonl", records, output / "tokenizer")
    model = {
        "model_type": "qwen2",
        "hidden_size": size.hidden_size,
        "intermediate_size": 2 * size.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": _SEQ_LENGTH,
        "tie_word_embeddings": True,
    }
    run = {
        "run": {"name": "reference", "dir": str(output / "reference"), "device": "cpu"},
        "model": {"config": model},
        "data": data(corpus, size.reference_batch, size.reference_steps),
        "objective": {"name": "sft"},
        **common(size.reference_lr),
    }
    return train_and_export(run)


def tune(directory: Path, start: Path, corpus: Path, objective: dict[str, Any], size: Size, seed: int) -> Path:
    """Train the reference on a curated corpus; returns its export."""
    run = {
        "run": {"name": directory.name, "dir": str(directory), "seed": seed, "device": "cpu"},
        "model": {"checkpoint": str(start)},
        "data": data(corpus, size.tuning_batch, size.tuning_steps),
        "objective": objective,
        **common(size.tuning_lr),
    }
    return train_and_export(run)


def data(corpus: Path, batch: int, steps: int) -> dict[str, Any]:
    sizes = {"seq_length": _SEQ_LENGTH, "micro_batch_size": batch, "global_batch_size": batch}
    return {"corpus": str(corpus), "max_steps": steps, **sizes}


def common(lr: float) -> dict[str, Any]:
    """Config sections that all runs share."""
    return {
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": lr, "schedule": "cosine", "weight_decay": 0.0},
        "checkpoint": {"every": 0},
        "export": {"at_end": True},
        "logging": {"every": 100},
    }


def train_and_export(run: dict[str, Any]) -> Path:
    """Train with this config, as launch/train.py does, unless the export exists; returns the Hugging Face directory."""
    import yaml

    from megatron_iwsft.config.loader import parse_config
    from megatron_iwsft.objectives.custom import find_objective
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    exported = Path(run["run"]["dir"]) / "hf" / f"step-{run['data']['max_steps']:08d}"
    if not exported.exists():
        config = parse_config(yaml.safe_dump(run, allow_unicode=True), [], where=run["run"]["name"])
        if find_objective(config.objective.name).needs_reference:
            precompute_reference(config)
        train(config)
    return exported


def shard(path: Path, records: list[dict[str, Any]], tokenizer: Path) -> Path:
    """Write records as JSONL to `path` and shard them into a corpus next to it."""
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus

    write(path, lines(records))
    corpus = path.with_name(path.name.removesuffix(".jsonl"))
    settings = ShardSettings(str(tokenizer), template="plain", record=RecordFormat(prompt_field="question"))
    shard_corpus([path], corpus, settings, show_progress=False)
    return corpus


def curate(answers: list[dict[str, Any]], share: float, count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` answers that pass the filter: all correct ones, and a fraction `share` of the wrong ones."""
    rng = random.Random(seed)
    kept = [a for a in answers if rng.random() < share or a["correct"]]
    if len(kept) < count:
        raise DataError(
            f"the filter keeps {len(kept)} of {len(answers)} answers, but {count} are needed. Raise --prompts."
        )
    return kept[:count]


def ask(model: Path, label: str, benchmark: Path, home: Path, *, temperature: float) -> list[dict[str, Any]]:
    """One answer per problem, as records (question, response, correct). Answers in HOME/answers are reused."""
    from megatron_iwsft.evaluate.benchmark import read_benchmark
    from megatron_iwsft.evaluate.generate import Sampling, TransformersGenerator
    from megatron_iwsft.evaluate.run import EvaluatedModel, evaluate_model

    sampling = Sampling(temperature=temperature, max_new_tokens=8)
    output = home / "answers" / f"{benchmark.stem}-temperature-{temperature:g}"
    evaluate_model(
        EvaluatedModel(label, model),
        read_benchmark(benchmark),
        output,
        settings=vars(sampling),
        samples=1,
        make=lambda directory: TransformersGenerator(directory, sampling, batch_size=500),
    )
    with open(output / f"{label}.jsonl", encoding="utf-8") as file:
        answered = [json.loads(line) for line in file][1:]
    return [
        {"question": p["prompt"], "response": p["answers"][0]["text"].strip(), "correct": p["answers"][0]["correct"]}
        for p in answered
    ]


def accuracy(model: Path, label: str, benchmark: Path, home: Path) -> dict[str, float]:
    """Fraction of the problems that a model solves, sampled and greedy."""
    answers = {name: ask(model, label, benchmark, home, temperature=t) for name, t in TEMPERATURES.items()}
    return {name: sum(a["correct"] for a in own) / len(own) for name, own in answers.items()}


def summarize(results: list[dict[str, Any]], how: str, objective: str, share: float | None) -> tuple[float, float]:
    """Mean and standard deviation over seeds, in percent; the latter is NaN with one seed."""
    values = [100 * r[how] for r in results if r["objective"] == objective and r.get("let_through") == share]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def filters(results: list[dict[str, Any]]) -> dict[float, float]:
    """Fraction of wrong answers kept by a filter → fraction of correct answers among the kept ones, mean over seeds."""
    shares = sorted({r["let_through"] for r in results if "let_through" in r})
    return {s: statistics.fmean(r["right"] for r in results if r.get("let_through") == s) for s in shares}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table: sampled / greedy accuracy in percent, mean ± standard deviation over seeds."""

    def cell(objective: str, share: float | None) -> str:
        pairs = (summarize(results, how, objective, share) for how in TEMPERATURES)
        return " / ".join(f"{m:.1f}" if math.isnan(s) else f"{m:.1f} ± {s:.1f}" for m, s in pairs)

    kept = filters(results)
    seeds = len({r["seed"] for r in results if "seed" in r})
    rows = [
        f"sampled / greedy accuracy, %, {seeds} seed{'s' * (seeds > 1)}; reference: {cell('reference', None)}\n",
        "| wrong answers kept | " + " | ".join(f"{100 * share:g} %" for share in kept) + " |",
        "|---|" + "---|" * len(kept),
        "| correct among the kept answers | " + " | ".join(f"{100 * right:.1f} %" for right in kept.values()) + " |",
    ]
    rows += [f"| {name} | " + " | ".join(cell(name, share) for share in kept) + " |" for name in OBJECTIVES]
    return "\n".join(rows)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy over the fraction of wrong answers among the kept ones, one line per objective; error bars are over seeds."""
    from megatron_iwsft.report.page import pyplot

    figure, panels = pyplot().subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    kept = filters(results)
    for axes, how in zip(panels, TEMPERATURES, strict=True):
        for name in OBJECTIVES:
            means, spreads = zip(*(summarize(results, how, name, share) for share in kept), strict=True)
            spreads = [0.0 if math.isnan(s) else s for s in spreads]
            axes.errorbar([100 * (1 - r) for r in kept.values()], means, spreads, marker="o", capsize=3, label=name)
        axes.axhline(summarize(results, how, "reference", None)[0], color="grey", linestyle=":", label="reference")
        axes.set_title(f"{how} accuracy, %", fontsize=10)
        axes.set_xlabel("wrong answers in the training data, %")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


if __name__ == "__main__":  # the checkpoint writer spawns processes that import this file
    run_command(main)
