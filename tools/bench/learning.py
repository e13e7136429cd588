"""Accuracy after training on curated answers, for every objective and two kinds of reference: tools/bench/learning.py [--output DIR]

Small references answer sums of two three-digit numbers, or chains of sums with their intermediate results (26 to 56 tokens). One errs at
random: half of its demonstrations had a wrong digit, and its most likely answer is right. The other is wrong by conviction: two thirds
of its last demonstrations add without carrying, so its most likely answer is wrong. It answers new problems, sampled at temperature 1;
a filter keeps the right answers and a share of the wrong ones. The reference is then trained on what was kept with each objective, all
else equal, by the project's trainer (in experiment 0 tensor parallel over two processes), exported, and evaluated on held-out problems.

The learning rate of every objective is the best of --lr on a development seed (number 0), which is not in the table, by problems of its
own. A seed determines the problems, the answers, which wrong ones are kept and the training order. Controls with the weights of iw-SFT at
level trajectory: each trajectory gets its neighbour's weight, or the batch's mean; and a reference that is refreshed every ten steps. They
use its learning rate.

Prints a table for each experiment: mean ± standard deviation over seeds, and the difference to SFT, paired by seed, with its 95 % interval.
Adds it to results.json and accuracy.svg, and ends with the CPU minutes that it took. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from learning_references import ERRS_AT_RANDOM, REFERENCES, WRONG_BY_CONVICTION, Size, train_references
from learning_stages import (
    cpu_seconds,
    curated_corpus,
    evaluate,
    lines,
    read,
    run_config,
    shard,
    stop_fork_server,
    train_all,
    write,
)
from learning_table import figure, table
from learning_tasks import Chains, Sums, SumsThatCarry

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import run_command

SFT, MEAN_1, MEAN_T, TOKEN, DFT, PSFT = "SFT", "sequence, τ = 1", "sequence, τ = T", "token", "DFT", "PSFT"
SFT_OF_MEANS = "SFT, normalize: sequences"

NARROW, WIDE = "trajectory, clip [0.2, 5]", "trajectory, clip [0.05, 20]"
ALL = (SFT, MEAN_1, MEAN_T, NARROW, TOKEN, DFT, PSFT)
CLIPS = (SFT, MEAN_T, NARROW, WIDE)
_SUM = {"level": "trajectory", "normalize": "sequence_weights", "clip": [0.2, 5.0]}
# What experiments 0 and 1 (the latter of 5e-4 and 1e-3) chose on their development seeds; other experiments with these references use it.
# Neither of them has WIDE, which gets the rate of NARROW.
TUNED = {SFT: 1e-3, MEAN_T: 5e-4, NARROW: 5e-4, WIDE: 5e-4, TOKEN: 2e-4, DFT: 2e-4}
TUNED_RANDOM = dict.fromkeys(CLIPS, 1e-3)
RANKS = (4, 16, 64)
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)  # of adapters, whose alpha is 32


def objectives(tokens: float) -> dict[str, dict[str, Any]]:
    """Config sections by name; iw-SFT unless named otherwise. tokens: T, the median of the answers' trained tokens."""
    mean = {"name": "iw_sft", "level": "sequence", "normalize": "sequence_weights"}
    return {
        SFT: {"objective": {"name": "sft"}},
        SFT_OF_MEANS: {"objective": {"name": "sft", "normalize": "sequences"}},
        MEAN_1: {"objective": {**mean, "temperature": 1.0}},
        MEAN_T: {"objective": {**mean, "temperature": tokens}},
        NARROW: {"objective": {"name": "iw_sft", **_SUM}},
        WIDE: {"objective": {"name": "iw_sft", **_SUM, "clip": [0.05, 20.0]}},
        TOKEN: {"objective": {"name": "iw_sft", "level": "token"}},
        DFT: {"objective": {"name": "dft"}},
        PSFT: {"objective": {"name": "psft"}},
    }


def with_adapters(sections: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same objectives, adapters of each rank trained in place of the weights, and their base as the reference."""
    common = {"reference": {"source": "base"}, "export": {"at_end": False}}  # they are merged instead
    return {
        adapted(name, rank): {**common, **section, "adapter": {"rank": rank}}
        for name, section in sections.items()
        for rank in RANKS
    }


def adapted(name: str, rank: int) -> str:
    return f"{name}, rank {rank}"


CONTROLS: dict[str, dict[str, Any]] = {
    "trajectory, neighbour's weight": {"objective": {"name": "iw_sft_of_the_neighbour", **_SUM}},
    "trajectory, batch's mean weight": {"objective": {"name": "iw_sft_mean", **_SUM, "normalize": "sequences"}},
    "trajectory, reference refreshed": {
        "objective": {"name": "iw_sft", **_SUM},
        "reference": {"source": "live", "refresh": 10},
    },
}


@dataclass(frozen=True)
class Experiment:
    """A task and its reference, the share of its wrong answers that the filter lets through, and what is trained on how often.

    seeds   besides the development seed, at most
    tensor  tensor-parallel processes of the fine-tuning on the reported seeds
    tuned   learning rates that were chosen in another experiment
    ranks   of adapters, which every objective trains as well
    """

    reference: str
    let_through: float
    curated: int
    epochs: int
    task: str = "sums"
    objectives: tuple[str, ...] = (SFT, MEAN_T, NARROW, TOKEN, DFT)
    controls: bool = False
    seeds: int = 4
    tensor: int = 1
    tuned: Mapping[str, float] | None = None
    ranks: tuple[int, ...] = ()

    @property
    def rows(self) -> list[str]:
        """Of its table: the objectives, and each with adapters."""
        return [row for o in self.objectives for row in (o, *(adapted(o, rank) for rank in self.ranks))]

    @property
    def name(self) -> str:
        layout = f"-tp{self.tensor}" if self.tensor > 1 else ""
        return f"{REFERENCES[self.reference]}-{self.let_through:g}-{self.curated}x{self.epochs}{layout}"

    def __str__(self) -> str:
        return (
            f"{self.task}, reference {self.reference}, {self.let_through:.0%} of its wrong answers let through, "
            f"{self.curated:,} answers × {self.epochs} epoch{'s' * (self.epochs > 1)}, TP {self.tensor}"
            + (f", adapters of rank {', '.join(map(str, self.ranks))}" if self.ranks else "")
        )


EXPERIMENTS = [
    Experiment(WRONG_BY_CONVICTION, 0.5, 5000, 1, objectives=ALL, controls=True, tensor=2),
    Experiment(ERRS_AT_RANDOM, 0.5, 5000, 1, objectives=ALL),
    Experiment(WRONG_BY_CONVICTION, 0.5, 800, 6, tuned=TUNED),
    Experiment(WRONG_BY_CONVICTION, 0.25, 5000, 1, tuned=TUNED),
    Experiment(WRONG_BY_CONVICTION, 0.0, 5000, 1, seeds=2, tuned=TUNED),
    # Answers of different lengths, where the normalisation matters: SFT has both.
    Experiment(
        WRONG_BY_CONVICTION,
        0.5,
        2000,
        1,
        task="chains",
        objectives=(*CLIPS, SFT_OF_MEANS, MEAN_1, TOKEN, DFT, PSFT),
    ),
    Experiment(WRONG_BY_CONVICTION, 0.5, 5000, 1, objectives=CLIPS, tuned=TUNED),
    Experiment(ERRS_AT_RANDOM, 0.5, 5000, 1, objectives=CLIPS, tuned=TUNED_RANDOM),
    Experiment(WRONG_BY_CONVICTION, 0.5, 300, 2, task="SmolLM2", objectives=(SFT, MEAN_T, TOKEN), seeds=2),
    Experiment(WRONG_BY_CONVICTION, 0.5, 5000, 1, objectives=(SFT, MEAN_T), seeds=2, ranks=RANKS),
]
DEFAULT = range(6)  # SmolLM2 needs a package registry
SIZES = {
    "sums": Size(Sums()),
    "chains": Size(Chains(), random_errors=0.2, reference_steps=1000, problems=200),
    "SmolLM2": Size(
        SumsThatCarry(),
        pretrained=True,
        lesson_steps=30,
        reference_batch=2,
        lessons_lr=5e-5,
        tuning_batch=2,
        problems=100,
        rates=(2e-5, 5e-5),
    ),
}
QUICK = Size(Sums(2), hidden_size=32, reference_steps=10, lesson_steps=5, reference_batch=2, problems=16)
QUICK_EXPERIMENTS = [Experiment(WRONG_BY_CONVICTION, 0.5, 16, 1, objectives=ALL, controls=True, tensor=2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument(
        "--seeds", type=int, default=2, help="besides the development seed, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help="learning rates of which the development seed chooses; or one for all (default: those of the experiment)",
    )
    parser.add_argument(
        "--experiments",
        type=int,
        nargs="+",
        choices=range(len(EXPERIMENTS)),
        metavar="N",
        help="; ".join(f"{i}: {experiment}" for i, experiment in enumerate(EXPERIMENTS)).replace("%", "%%"),
    )
    parser.add_argument("--objectives", nargs="+", metavar="NAME", help="SFT and only these rows of the tables")
    parser.add_argument("--quick", action="store_true", help="a smoke run: every part, almost no training")
    args = parser.parse_args()
    if args.seeds < 1 or not all(0 < lr < 1 for lr in args.lr or ()):
        parser.error("--seeds must be at least 1, --lr between 0 and 1")
    chosen = args.experiments or DEFAULT
    experiments, sizes = [EXPERIMENTS[i] for i in chosen], SIZES
    if args.quick:
        args.seeds, sizes = 1, {"sums": replace(QUICK, rates=QUICK.rates[:2])}
        small = [replace(e, task="sums", curated=16, epochs=1, ranks=e.ranks[:1]) for e in experiments]
        experiments = small if args.experiments else QUICK_EXPERIMENTS
    if args.objectives:
        wanted = {SFT, *args.objectives}
        unknown = wanted - {name for e in experiments for name in e.objectives}
        if unknown:
            parser.error(f"no such row: {', '.join(sorted(unknown))}")
        experiments = [
            replace(e, objectives=tuple(o for o in e.objectives if o in wanted), controls=False) for e in experiments
        ]
    tuned = [str(i) for i in ([] if args.quick and not args.experiments else chosen) if EXPERIMENTS[i].tuned]
    if args.lr and len(args.lr) > 1 and tuned:
        parser.error(
            f"several --lr are for experiments that choose among them; experiments {', '.join(tuned)} use rates that another one chose. "
            "Give one --lr, or other --experiments"
        )
    if args.lr and len(args.lr) == 1:
        experiments = [replace(e, tuned=dict.fromkeys(e.rows, args.lr[0])) for e in experiments]
    if args.lr:
        sizes = {task: replace(size, rates=tuple(args.lr)) for task, size in sizes.items()}
    run_all(experiments, sizes, args.output, args.seeds)


def run_all(experiments: Sequence[Experiment], sizes: dict[str, Size], output: Path, seeds: int) -> None:
    """Run experiments, print their tables, and add them to results.json and accuracy.svg in `output`."""
    benches = {
        task: Bench(output / task, size, {e.reference for e in experiments if e.task == task})
        for task, size in sizes.items()
        if any(e.task == task for e in experiments)
    }
    stored = output / "results.json"
    earlier = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    panels = {what_ran(panel): panel for panel in earlier}
    for experiment in experiments:
        bench, title = benches[experiment.task], str(experiment)
        tried = [] if experiment.tuned else bench.try_rates(experiment)
        rates = experiment.tuned or best_rates(tried)
        reported = bench.run(experiment, rates, range(1, min(seeds, experiment.seeds) + 1))
        reference = bench.references[experiment.reference]
        panel = {"title": title, "reference": reference, "tried": tried, "results": reported}
        panels[what_ran(panel)] = panel
        print(f"\n{table(title, reference, reported)}\n", flush=True)
        write(stored, json.dumps(list(panels.values()), indent=1, ensure_ascii=False) + "\n")
        write(output / "accuracy.svg", figure(list(panels.values())))
    spent = {task: bench.cpu_minutes() for task, bench in benches.items()}
    stop_fork_server()
    print(f"{output}/results.json, {output}/accuracy.svg")
    print(f"CPU minutes, with all processes: {cpu_seconds() / 60:.1f}; of all starts, by task: {spent}")


def what_ran(panel: Mapping[str, Any]) -> tuple[Any, ...]:
    """What distinguishes a panel of results.json: its experiment, and the rows with their learning rates. More seeds replace fewer."""
    return panel["title"], *sorted({(result["objective"], result["lr"]) for result in panel["results"]})


class Bench:
    """Runs the experiments of one task in `home`, after training the references that they need.

    references: what each reference answers, see `evaluate`
    """

    def __init__(self, home: Path, size: Size, names: set[str]) -> None:
        self._home, self._size = home, size
        _check_size(home, size)
        problems = list(size.task.problems(size.problems, seed=99))
        self._held_out = frozenset(problem["question"] for problem in problems)
        development = list(size.task.problems(size.problems, seed=98, held_out=self._held_out))
        # The references and the reported seeds may have seen these: only what the development seed trains on is kept from them.
        self._development = frozenset(problem["question"] for problem in development)
        self._benchmark, self._development_benchmark = home / "problems.jsonl", home / "development.jsonl"
        write(self._benchmark, lines(problems))
        write(self._development_benchmark, lines(development))
        start = cpu_seconds()
        training_s = train_references(home, size, names, self._held_out)
        self._spent("references", training_s + cpu_seconds() - start)
        self._answers = shard(home / "answers.jsonl", problems, home / "tokenizer")
        self._development_answers = shard(home / "development-answers.jsonl", development, home / "tokenizer")
        self.references = {
            n: self._evaluated(home / REFERENCES[n], home, reference=n) for n in REFERENCES if n in names
        }

    def try_rates(self, experiment: Experiment) -> list[dict[str, Any]]:
        """Train every objective at every learning rate on the development seed. Returns one dict per evaluated model."""
        of_weights, count = self._size.rates, len(self._size.rates)
        rates = {row: of_weights if row in experiment.objectives else ADAPTER_RATES[:count] for row in experiment.rows}
        return self._train(
            replace(experiment, tensor=1), 0, [(row, lr) for row in experiment.rows for lr in rates[row]]
        )

    def run(self, experiment: Experiment, rates: Mapping[str, float], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Train every objective at its learning rate on each seed. Returns one dict per evaluated model."""
        wanted = [(row, rates[row]) for row in experiment.rows]
        if experiment.controls:
            wanted += [(name, rates[NARROW]) for name in CONTROLS]
        return [result for seed in seeds for result in self._train(experiment, seed, wanted)]

    def _train(self, experiment: Experiment, seed: int, wanted: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        """Train objectives at learning rates on one seed's corpus, in one job, and evaluate them."""
        from megatron_iwsft.data.corpus import Corpus

        home, size, start = self._home, self._size, cpu_seconds()
        held_out = self._held_out if seed else self._held_out | self._development
        directory, reference = home / experiment.name / f"seed-{seed}", home / REFERENCES[experiment.reference]
        corpus, right = curated_corpus(
            directory,
            reference,
            home / "tokenizer",
            size.task,
            count=experiment.curated,
            share=experiment.let_through,
            seed=seed,
            held_out=held_out,
        )
        sections = objectives(float(statistics.median(Corpus.open(corpus).num_trained.tolist())))
        sections |= with_adapters(sections) | CONTROLS
        data = {"epochs": experiment.epochs, "drawn_from": "reference_filtered"}
        runs = {
            (name, lr): run_config(
                directory / f"{_file_name(name)}-lr-{lr:g}",
                corpus,
                size.tuning_batch,
                data,
                {"model": {"checkpoint": str(reference)}, **sections[name]},
                lr,
                seed=seed,
            )
            for name, lr in wanted
        }
        training_s = train_all(list(runs.values()), experiment.tensor)
        results = [
            self._evaluated(
                Path(run["run"]["dir"]), directory, development=seed == 0, objective=name, lr=lr, seed=seed, right=right
            )
            for (name, lr), run in runs.items()
        ]
        self._spent(f"{experiment}, seed {seed}", training_s + cpu_seconds() - start)
        return results

    def _spent(self, what: str, cpu_s: float) -> None:
        with open(self._home / "cpu.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "cpu_s": round(cpu_s, 1)}) + "\n")

    def cpu_minutes(self) -> float:
        """Of all processes, in this and earlier starts of the command, but for what it takes to start them."""
        return round(sum(line["cpu_s"] for line in read(self._home / "cpu.jsonl")) / 60, 1)

    def _evaluated(self, run: Path, directory: Path, *, development: bool = False, **facts: Any) -> dict[str, Any]:
        """On the held-out problems, or those by which learning rates are chosen."""
        tokens = self._size.task.answer_tokens
        if development:
            problems = self._development_benchmark, self._development_answers, directory / "development-answers"
        else:
            problems = self._benchmark, self._answers, directory / "answers"
        result = {**facts, **evaluate(run, *problems, tokens)}
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result


def best_rates(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each objective's best result, by the exact probability of the right answer."""
    by_accuracy = sorted(results, key=lambda result: result["exact"])
    return {result["objective"]: result["lr"] for result in by_accuracy}


def _check_size(home: Path, size: Size) -> None:
    """Raise DataError if `home` holds runs of another size."""
    path, settings = home / "size.json", json.loads(json.dumps(asdict(replace(size, rates=()))))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise DataError(f"{home} has results of another size. Remove it, or choose another --output.")
    write(path, json.dumps(settings, indent=1) + "\n")


def _file_name(label: str) -> str:
    words = "".join(c if c.isalnum() or c == "." else " " for c in label.replace("τ", "tau")).split()
    return "-".join(words)


if __name__ == "__main__":  # a job's processes import this file
    run_command(main)
