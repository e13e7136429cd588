"""The section `evaluation` of a config, and what its metrics decide: which checkpoints are kept, and when the run ends."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_iwsft.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from megatron_iwsft.objectives.functions import OBJECTIVES
from megatron_iwsft.objectives.metrics import METRICS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class EvaluationSet(Section):
    """One corpus of held-out trajectories."""

    name: Name
    """Of the set in metrics and messages: letters, digits, and . _ - after the first."""
    corpus: str
    """Corpus directory, made with the same tokenizer."""
    max_trajectories: PositiveInt | None = None
    """Evaluate so many of its trajectories, drawn once: the same in every evaluation and every run. null: all of them."""


class Answers(Section):
    """Answers that the policy generates: pass@k on benchmarks, and samples. At the same points of a run as sets, at steps of its own."""

    every: NonNegativeInt = 0
    """Steps between them. 0: only before the first step and after the last."""
    benchmarks: list[str] = []
    """Files of problems with verifiable answers, as for `iwsft evaluate --benchmark`. FILE.jsonl gives the metrics eval/FILE/pass@K."""
    prompts: str | None = None
    """JSONL file of a few fixed prompts, each with an answer or without. What the policy answers, its verdict and the weight that it would
    have in training are written to the run directory (samples/) and shown by `iwsft report`."""
    where: Literal["in_process", "slurm"] = "in_process"
    """in_process: the first rank answers with `transformers` while the others wait, within run.hang_timeout_s; for small models.
    slurm: a job of slurm/evaluate.sbatch does, while training continues; its results are joined to their steps in the report."""
    sbatch: list[str] = []
    """With where slurm: options for sbatch, such as --gpus-per-node=1."""
    limit: PositiveInt | None = None
    """Only the first so many problems of each benchmark. null: all of them."""
    samples: PositiveInt = 1
    """Answers per problem and prompt."""
    temperature: NonNegativeFloat = 0.0
    """Of sampling; 0 is greedy, for one answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus sampling, with a temperature."""
    max_new_tokens: PositiveInt = 256
    """Tokens per answer at most."""
    batch_size: PositiveInt = 16
    """Answers generated at once by `transformers`."""
    prompt_format: str = "{prompt}"
    """Text around the question, such as an instruction."""
    raw: bool = False
    """No chat template."""

    @model_validator(mode="after")
    def _consistent(self) -> Answers:
        names = [Path(file).stem for file in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(
                "benchmarks: two have the same file name, under which results are stored. Rename one of them"
            )
        if (self.samples == 1) != (self.temperature == 0):
            raise ValueError(
                f"samples {self.samples} do not go with temperature {self.temperature:g}: one answer is greedy, "
                "several are sampled. Set temperature to 0 for one, above 0 for several"
            )
        if "{prompt}" not in self.prompt_format:
            raise ValueError(f"prompt_format {self.prompt_format!r} must contain {{prompt}}, where the question goes")
        if (self.every or self.sbatch) and not self.wanted:
            raise ValueError("there is nothing to answer: add benchmarks or prompts")
        return self

    @property
    def wanted(self) -> bool:
        return bool(self.benchmarks) or self.prompts is not None

    @property
    def ks(self) -> list[int]:
        """Of pass@k: 1, 2, 4, … up to `samples`."""
        return [2**i for i in range(self.samples.bit_length())]

    @property
    def metrics(self) -> list[str]:
        """Those in the step's own line of metrics: a job beside the run is finished later."""
        if self.where == "slurm":
            return []
        return [f"eval/{Path(file).stem}/pass@{k}" for file in self.benchmarks for k in self.ks]


class Evaluation(Section):
    """Metrics of held-out trajectories, before the first step, every few steps, and after the last."""

    every: NonNegativeInt = 0
    """Steps between evaluations. 0: only before the first step and after the last."""
    sets: list[EvaluationSet] = []
    """Held-out corpora: a list of mappings with the keys name, corpus (a directory) and max_trajectories.
    name: of the set in metrics: eval/NAME/nll, and eval/NAME/nll/source … for each source.
    max_trajectories: evaluate so many, drawn once, the same in every evaluation. By default all."""
    answers: Answers = Answers()

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        if self.every and not self.sets:
            raise ValueError(f"every is {self.every}, but there is nothing to evaluate: add sets, or leave out every")
        names = [entry.name for entry in self.sets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sets: two have the name {twice}. Set name for one of them")
        shared = {Path(file).stem for file in self.answers.benchmarks} & set(names)
        if shared:
            raise ValueError(
                f"a set and a benchmark have the name {min(shared)}. Set name of the set, or rename the benchmark's file"
            )
        return self


class MetricChoice(Section):
    """A metric of an evaluation, and which of two of its values is better."""

    metric: str
    """A metric of an evaluation set, such as eval/NAME/nll."""
    mode: Literal["min", "max"] | None = None
    """Whether lower or higher values are better. null: min for loss and nll; other metrics need it."""

    @property
    def sign(self) -> float:
        """Times the metric's value: lower is better."""
        return -1.0 if self.mode == "max" else 1.0


class Best(MetricChoice):
    """Keep the checkpoints with the best values of a metric, beside the newest ones."""

    keep: PositiveInt = 1
    """How many of them."""


class StopEarly(MetricChoice):
    """End the run, with exit status 0, when a metric no longer improves."""

    patience: PositiveInt
    """Evaluations in a row without an improvement after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """An improvement is a value better than the best before it by more than this."""


def metric_problem(choice: MetricChoice, evaluation: Evaluation, objective: str) -> str | None:
    """Why a metric cannot be chosen, in one sentence; None if it can. An objective from a file can have any metric."""
    known = evaluated_metrics(evaluation, objective)
    if not known:
        return f"metric {choice.metric} needs evaluation.sets or benchmarks in process, and there are none"
    if choice.metric not in known and not (objective not in OBJECTIVES and _of_a_set(choice.metric, evaluation)):
        near = difflib.get_close_matches(choice.metric, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Metrics of this run: {', '.join(known)}."
        return f"metric {choice.metric} is none that this run evaluates. {hint}"
    if choice.mode is None and choice.metric.rpartition("/")[2] not in ("nll", "loss"):
        return f"metric {choice.metric} needs mode: min or mode: max"
    return None


def evaluated_metrics(evaluation: Evaluation, objective: str) -> list[str]:
    """The metrics of every evaluation of a run, apart from those of groups. Of a custom objective those that all can have."""
    known = OBJECTIVES.get(objective)
    metrics = known.evaluated if known else [m for m in METRICS if m.evaluated and not m.measured]
    of_sets = [f"eval/{entry.name}/{metric.name}" for entry in evaluation.sets for metric in metrics]
    return of_sets + evaluation.answers.metrics


def _of_a_set(metric: str, evaluation: Evaluation) -> bool:
    return any(metric.startswith(f"eval/{entry.name}/") for entry in evaluation.sets)
