"""Which objective learns best from curated answers, by how clean the curation is: tools/bench/learning.py [--output DIR]

Everything goes through the trainer, the exporter and the evaluation of this project. A small model learns sums of two three-digit
numbers from demonstrations of which half are wrong: the reference. For each seed it answers new problems, sampled at temperature 1,
and a filter keeps the right answers and lets a share of the wrong ones through. On what is kept the reference is tuned with each
objective, all else equal, exported, and asked held-out problems. A seed decides which problems are answered, which wrong answers
pass, and the order of training; the reference and the held-out problems are the same for all.

Prints a table of accuracies, mean ± standard deviation over seeds, and writes results.json and accuracy.svg. The same command goes
on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import run_command

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
    """What a table costs. A batch counts packed sequences of 256 tokens. prompts: problems that the reference answers, of which
    `curated` are trained on."""

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
        metavar="SHARE",
        help="of the wrong answers, by the filters to compare",
    )
    parser.add_argument(
        "--reference-steps",
        type=int,
        default=Size.reference_steps,
        help="training of the reference; fewer leave one that is wrong itself, not only unsure (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=Size.prompts,
        help=f"problems that the reference answers; {Size.curated} answers are kept (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, one filter, next to no training")
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
        raise DataError(f"{output} holds a table of another size. Remove it, or choose another --output.")
    write(path, json.dumps(settings, indent=1) + "\n")


def bench(output: Path, size: Size, seeds: Iterable[int], shares: list[float]) -> list[dict[str, Any]]:
    """The reference, and every objective after every filter with every seed."""
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
    """A two-layer model from random weights, on demonstrations each seen once; returns its export."""
    from megatron_iwsft.data.prepare.arithmetic import short_sums
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    # With the template's words, a sum of n digits has 3 n + 11 tokens.
    demonstrations = size.reference_steps * size.reference_batch * (_SEQ_LENGTH // (3 * size.digits + 11))
    records = list(short_sums(demonstrations, digits=size.digits, wrong=size.wrong, seed=0, held_out=held_out))
    # The tokenizer also sees the words of the template, so that each is a token or two.
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
    """The reference, tuned on a curated corpus; returns its export."""
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
    """The sections that all runs share."""
    return {
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": lr, "schedule": "cosine", "weight_decay": 0.0},
        "checkpoint": {"every": 0},
        "export": {"at_end": True},
        "logging": {"every": 100},
    }


def train_and_export(run: dict[str, Any]) -> Path:
    """Train as launch/train.py would with this config, unless it is done; returns the Hugging Face directory."""
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
    """Records → JSONL at `path` → a corpus beside it."""
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus

    write(path, lines(records))
    corpus = path.with_name(path.name.removesuffix(".jsonl"))
    settings = ShardSettings(str(tokenizer), template="plain", record=RecordFormat(prompt_field="question"))
    shard_corpus([path], corpus, settings, show_progress=False)
    return corpus


def curate(answers: list[dict[str, Any]], share: float, count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` answers that are right, or wrong and let through."""
    rng = random.Random(seed)
    kept = [a for a in answers if rng.random() < share or a["correct"]]
    if len(kept) < count:
        raise DataError(f"the filter keeps {len(kept)} of {len(answers)} answers; {count} are needed.")
    return kept[:count]


def ask(model: Path, label: str, benchmark: Path, home: Path, *, temperature: float) -> list[dict[str, Any]]:
    """One answer to each problem, as records: question, response, correct. What HOME/answers holds is not asked again."""
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
    """Share of the problems that a model solves, sampled and greedy."""
    answers = {name: ask(model, label, benchmark, home, temperature=t) for name, t in TEMPERATURES.items()}
    return {name: sum(a["correct"] for a in own) / len(own) for name, own in answers.items()}


def summarize(results: list[dict[str, Any]], how: str, objective: str, share: float | None) -> tuple[float, float]:
    """Mean and standard deviation over seeds, in per cent; the latter NaN of one seed."""
    values = [100 * r[how] for r in results if r["objective"] == objective and r.get("let_through") == share]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def filters(results: list[dict[str, Any]]) -> dict[float, float]:
    """Share of wrong answers let through → share of right ones among those kept, the mean over seeds."""
    shares = sorted({r["let_through"] for r in results if "let_through" in r})
    return {s: statistics.fmean(r["right"] for r in results if r.get("let_through") == s) for s in shares}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: sampled / greedy accuracy in per cent, mean ± standard deviation over seeds."""

    def cell(objective: str, share: float | None) -> str:
        pairs = (summarize(results, how, objective, share) for how in TEMPERATURES)
        return " / ".join(f"{m:.1f}" if math.isnan(s) else f"{m:.1f} ± {s:.1f}" for m, s in pairs)

    kept = filters(results)
    seeds = len({r["seed"] for r in results if "seed" in r})
    rows = [
        f"sampled / greedy accuracy, %, {seeds} seed{'s' * (seeds > 1)}; the reference: {cell('reference', None)}\n",
        "| wrong answers let through | " + " | ".join(f"{100 * share:g} %" for share in kept) + " |",
        "|---|" + "---|" * len(kept),
        "| right among the answers kept | " + " | ".join(f"{100 * right:.1f} %" for right in kept.values()) + " |",
    ]
    rows += [f"| {name} | " + " | ".join(cell(name, share) for share in kept) + " |" for name in OBJECTIVES]
    return "\n".join(rows)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the share of wrong answers among those kept, a line for each objective; bars are seeds' deviations."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    kept = filters(results)
    for axes, how in zip(panels, TEMPERATURES, strict=True):
        for name in OBJECTIVES:
            means, spreads = zip(*(summarize(results, how, name, share) for share in kept), strict=True)
            spreads = [0.0 if math.isnan(s) else s for s in spreads]
            axes.errorbar([100 * (1 - r) for r in kept.values()], means, spreads, marker="o", capsize=3, label=name)
        axes.axhline(summarize(results, how, "reference", None)[0], color="grey", linestyle=":", label="reference")
        axes.set_title(f"{how} accuracy, %", fontsize=10)
        axes.set_xlabel("wrong among the answers trained on, %")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":  # the checkpoint writer spawns processes that import this file
    run_command(main)
