"""Accuracy after training on curated answers, for every objective and two kinds of reference: tools/bench/learning.py [--output DIR]

Two small references answer sums of two three-digit numbers. One errs at random: half of its demonstrations had a wrong digit, and its
most likely answer is right. The other is wrong by conviction: two thirds of its last demonstrations add without carrying, so its most
likely answer is wrong. It answers new problems, sampled at temperature 1; a filter keeps the right answers and a share of the wrong
ones. The reference is then trained on what was kept with each objective, all else equal, by the project's trainer (tensor parallel over
two processes), exported, and evaluated on held-out problems.

The learning rate of every objective is the best of --lr on a development seed (number 0), which is not in the table. A seed determines the
problems, the answers, which wrong ones are kept and the training order. Controls with the weights of iw-SFT at level trajectory: each
trajectory gets its neighbour's weight, or the batch's mean; and a reference that is refreshed every ten steps. They use its learning rate.

Prints a table for each experiment, mean ± standard deviation over seeds; writes results.json and accuracy.svg. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learning_stages import (
    ERRS_AT_RANDOM,
    REFERENCES,
    WRONG_BY_CONVICTION,
    Size,
    curated_corpus,
    evaluate,
    exported,
    lines,
    shard,
    train_all,
    train_references,
    tuning_run,
    write,
)

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import run_command

COLUMNS = {"exact": "exact", "cool": "temperature 0.5", "greedy": "greedy", "ess": "ESS"}
_TRAJECTORY = {"level": "trajectory", "normalize": "sequence_weights"}


def objectives(tokens: float) -> dict[str, dict[str, Any]]:
    """Config sections by name. tokens: T, the trained tokens of an answer."""
    mean = {"name": "iw_sft", "level": "sequence", "normalize": "sequence_weights"}
    return {
        "SFT": {"objective": {"name": "sft"}},
        "iw-SFT, sequence, τ = 1": {"objective": {**mean, "temperature": 1.0}},
        "iw-SFT, sequence, τ = T": {"objective": {**mean, "temperature": tokens}},
        "iw-SFT, trajectory": {"objective": {"name": "iw_sft", **_TRAJECTORY}},
        "iw-SFT, token": {"objective": {"name": "iw_sft", "level": "token"}},
        "DFT": {"objective": {"name": "dft"}},
        "PSFT": {"objective": {"name": "psft"}},
    }


CONTROLS: dict[str, dict[str, Any]] = {
    "trajectory, neighbour's weight": {"objective": {"name": "iw_sft_of_the_neighbour", **_TRAJECTORY}},
    "trajectory, batch's mean weight": {
        "objective": {"name": "iw_sft_mean", "level": "trajectory", "normalize": "sequences"}
    },
    "trajectory, reference refreshed": {
        "objective": {"name": "iw_sft", **_TRAJECTORY},
        "reference": {"source": "live", "refresh": 10},
    },
}
_CONTROLLED = "iw-SFT, trajectory"


@dataclass(frozen=True)
class Experiment:
    """A reference, the share of its wrong answers that the filter lets through, and what is trained on how often."""

    reference: str
    let_through: float
    curated: int
    epochs: int
    controls: bool = False

    @property
    def name(self) -> str:
        return f"{REFERENCES[self.reference]}-{self.let_through:g}-{self.curated}x{self.epochs}"

    def __str__(self) -> str:
        return (
            f"reference {self.reference}, {self.let_through:.0%} of its wrong answers let through, {self.curated:,} answers × "
            f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        )


EXPERIMENTS = [
    Experiment(WRONG_BY_CONVICTION, 0.5, 5000, 1, controls=True),
    Experiment(ERRS_AT_RANDOM, 0.5, 5000, 1),
    Experiment(WRONG_BY_CONVICTION, 0.5, 800, 6),
    Experiment(WRONG_BY_CONVICTION, 0.25, 5000, 1),
    Experiment(WRONG_BY_CONVICTION, 0.0, 5000, 1),
    Experiment(ERRS_AT_RANDOM, 0.5, 800, 6),
]
QUICK = Size(digits=2, hidden_size=32, reference_steps=10, conviction_steps=5, reference_batch=2, spare=8, problems=16)
QUICK_EXPERIMENTS = [Experiment(WRONG_BY_CONVICTION, 0.5, 16, 1, controls=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, default=4, help="besides the development seed (default: %(default)s)")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[2e-4, 5e-4, 1e-3],
        help="learning rates of which the development seed chooses (default: %(default)s)",
    )
    parser.add_argument(
        "--experiments",
        type=int,
        nargs="+",
        choices=range(len(EXPERIMENTS)),
        default=list(range(len(EXPERIMENTS))),
        metavar="N",
        help="; ".join(f"{i}: {experiment}" for i, experiment in enumerate(EXPERIMENTS)).replace("%", "%%"),
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: every part, almost no training")
    args = parser.parse_args()
    if args.seeds < 1 or not all(0 < lr < 1 for lr in args.lr):
        parser.error("--seeds must be at least 1, --lr between 0 and 1")
    experiments, size = [EXPERIMENTS[i] for i in args.experiments], Size()
    if args.quick:
        args.seeds, args.lr, experiments, size = 1, args.lr[:2], QUICK_EXPERIMENTS, QUICK
    check_output(args.output, size)
    bench = Bench(args.output, size, experiments)
    for experiment in experiments:
        bench.run(experiment, args.lr, seeds=range(1, args.seeds + 1))
        print(f"\n{table(bench.results, experiment)}\n", flush=True)
    write(args.output / "results.json", json.dumps(bench.results, indent=1, ensure_ascii=False) + "\n")
    plot(bench.results, experiments, args.output / "accuracy.svg")
    cpu_minutes = (bench.training_cpu_s + time.process_time()) / 60
    print(f"{args.output}/results.json, {args.output}/accuracy.svg; {cpu_minutes:.1f} CPU minutes in this command")


def check_output(output: Path, size: Size) -> None:
    """Raise DataError if `output` holds runs of another size."""
    path, settings = output / "size.json", asdict(size)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise DataError(f"{output} has results of another size. Remove it, or choose another --output.")
    write(path, json.dumps(settings, indent=1) + "\n")


class Bench:
    """Runs experiments in `output`, after training the references that they need.

    results: one dict per evaluated model; training_cpu_s: CPU seconds of the training processes
    """

    def __init__(self, output: Path, size: Size, experiments: Sequence[Experiment]) -> None:
        from megatron_iwsft.data.prepare.arithmetic import short_sums

        self.output, self.size = output, size
        problems = list(short_sums(size.problems, digits=size.digits, wrong=0.0, seed=99))
        self._held_out = frozenset(problem["question"] for problem in problems)
        self._benchmark = output / "problems.jsonl"
        write(self._benchmark, lines(problems))
        names = {experiment.reference for experiment in experiments}
        self.training_cpu_s = train_references(output, size, names, self._held_out)
        self._answers = shard(output / "answers.jsonl", problems, output / "tokenizer")
        self.results = [self._evaluated(output / REFERENCES[n], output, reference=n) for n in REFERENCES if n in names]

    def run(self, experiment: Experiment, rates: Sequence[float], *, seeds: Sequence[int]) -> None:
        """Choose a learning rate for each objective on seed 0, then train and evaluate the other seeds with it."""
        tried = [(name, lr) for name in objectives(1.0) for lr in rates]
        best: dict[str, dict[str, Any]] = {}
        for result in self._train(experiment, 0, tried):
            name = result["objective"]
            best[name] = max(best.get(name, result), result, key=lambda r: r["exact"])
        chosen = [(name, best[name]["lr"]) for name in best]
        if experiment.controls:
            chosen += [(name, best[_CONTROLLED]["lr"]) for name in CONTROLS]
        for seed in seeds:
            self._train(experiment, seed, chosen)

    def _train(self, experiment: Experiment, seed: int, wanted: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        """Train objectives at learning rates on one seed's corpus, in one job, and evaluate them."""
        from megatron_iwsft.data.corpus import Corpus

        home = self.output / experiment.name / f"seed-{seed}"
        corpus, right = curated_corpus(
            self.output,
            home,
            experiment.reference,
            self.size,
            count=experiment.curated,
            share=experiment.let_through,
            seed=seed,
            held_out=self._held_out,
        )
        sections = objectives(float(statistics.median(Corpus.open(corpus).num_trained.tolist()))) | CONTROLS
        reference = self.output / REFERENCES[experiment.reference]
        runs = {}
        for name, lr in wanted:
            directory = home / f"{list(sections).index(name)}-lr-{lr:g}"
            options = {"epochs": experiment.epochs, "lr": lr, "seed": seed}
            runs[name, lr] = tuning_run(directory, reference, corpus, sections[name], self.size, **options)
        self.training_cpu_s += train_all(list(runs.values()), self.size.processes)
        facts = {"experiment": experiment.name, "seed": seed, "right": right}
        found = [
            self._evaluated(Path(run["run"]["dir"]), home, objective=name, lr=lr, **facts)
            for (name, lr), run in runs.items()
        ]
        self.results += found
        return found

    def _evaluated(self, run: Path, home: Path, **facts: Any) -> dict[str, Any]:
        assert exported(run) is not None
        result = {**facts, **evaluate(run, self._benchmark, self._answers, home)}
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result


def of_experiment(results: list[dict[str, Any]], experiment: Experiment) -> dict[str, list[dict[str, Any]]]:
    """Results by objective, without those of the development seed."""
    out: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result.get("experiment") == experiment.name and result["seed"] > 0:
            out.setdefault(result["objective"], []).append(result)
    return out


def percent(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, in percent; the latter is 0 with one value."""
    return 100 * statistics.fmean(values), 100 * (statistics.stdev(values) if len(values) > 1 else 0.0)


def table(results: list[dict[str, Any]], experiment: Experiment) -> str:
    """Markdown: for each objective its learning rate, accuracies in percent and the effective sample size."""
    rows = of_experiment(results, experiment)
    reference = next(r for r in results if r.get("reference") == experiment.reference)
    some = next(iter(rows.values()))
    out = [
        f"{experiment}; {100 * statistics.fmean(r['right'] for r in some):.1f} % of what is trained on is right; {len(some)} seeds",
        "",
        "| objective | lr | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
        "| reference | | " + " | ".join(f"{100 * reference[c]:.1f}" for c in COLUMNS if c in reference) + " | |",
    ]
    for name, found in rows.items():
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in found if column in r and not math.isnan(r[column])]
            if column == "ess":
                cells.append(f"{statistics.fmean(values):.2f}" if values else "")
            else:
                cells.append("{:.1f} ± {:.1f}".format(*percent(values)))
        out.append(f"| {name} | {found[0]['lr']:g} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def plot(results: list[dict[str, Any]], experiments: Sequence[Experiment], path: Path) -> None:
    """Plot for each experiment the exact and the greedy accuracy of every objective; error bars are over seeds."""
    from megatron_iwsft.report.page import pyplot

    figure, panels = pyplot().subplots(
        len(experiments), 1, figsize=(8, 3.4 * len(experiments)), layout="constrained", squeeze=False
    )
    for (axes,), experiment in zip(panels, experiments, strict=True):
        rows = of_experiment(results, experiment)
        reference = next(r for r in results if r.get("reference") == experiment.reference)
        for column, colour in (("exact", "C0"), ("greedy", "C1")):
            means, spreads = zip(*(percent([r[column] for r in found]) for found in rows.values()), strict=True)
            axes.errorbar(
                means, range(len(rows)), xerr=spreads, fmt="o", capsize=3, color=colour, label=COLUMNS[column]
            )
            axes.axvline(100 * reference[column], color=colour, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_title(str(experiment), fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].legend(title="accuracy, %; dotted: reference", fontsize=8)
    figure.savefig(path)
    pyplot().close(figure)


if __name__ == "__main__":  # a job's processes import this file
    run_command(main)
