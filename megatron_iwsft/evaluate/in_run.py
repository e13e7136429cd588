"""The answers of a run's policy at one step: pass@k on benchmarks, and samples with their weights. In the training job or a job beside it.

RUN/evaluation/BENCHMARK/step-….jsonl   every answer with its verdict, as `run.py` writes it; an interrupted call continues it
RUN/evaluation/BENCHMARK/step-….json    the result of that step: replaced, never added to, so there is one per step
RUN/samples/step-….jsonl                the answers to `evaluation.answers.prompts`, with verdicts and weights
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_iwsft.checkpoint.info import step_name
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.config.evaluation import Answers
from megatron_iwsft.config.loader import load_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.evaluate.benchmark import Problem, read_benchmark, read_prompts
from megatron_iwsft.evaluate.generate import Answer, Generator, PromptFormat, Sampling, make_generator
from megatron_iwsft.evaluate.results import EVALUATION, SAMPLES
from megatron_iwsft.evaluate.run import EvaluatedModel, Result, evaluate_model, judged_answer
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.objectives.custom import find_objective
from megatron_iwsft.objectives.functions import Objective, Settings, Trajectories, local_segment_sum
from megatron_iwsft.objectives.loss import micro_batch_loss, sum_names
from megatron_iwsft.utils.files import sampled_fingerprint, write_json, write_text
from megatron_iwsft.utils.jsonl import encode, read_json_lines


@dataclass(frozen=True)
class StepAnswers:
    """What is answered at a step of a run.

    model      Hugging Face directory of the policy after that step
    reference  of the reference; None if there is none, and then samples of an objective that needs it have no weights
    """

    run: Path
    step: int
    model: Path
    answers: Answers
    objective: Objective
    settings: Settings
    reference: Path | None

    def all(self) -> dict[str, float]:
        """Answer everything that is not answered yet; the step's metrics, eval/BENCHMARK/pass@K. Raises UserError."""
        metrics: dict[str, float] = {}
        for benchmark in self.answers.benchmarks:
            metrics |= self._benchmark(Path(benchmark))
        if self.answers.prompts is not None:
            self._samples(Path(self.answers.prompts))
        return metrics

    @cached_property
    def _sampling(self) -> Sampling:
        given = self.answers
        top_p = given.top_p if given.temperature else 1.0
        return Sampling(given.samples, given.temperature, top_p, given.max_new_tokens)

    @cached_property
    def _generator(self) -> Generator:
        given = self.answers
        return make_generator(
            self.model,
            self._sampling,
            backend="transformers" if given.where == "in_process" else "auto",
            batch_size=given.batch_size,
            wrapper=given.prompt_format,
            raw=given.raw,
        )

    def _benchmark(self, file: Path) -> dict[str, float]:
        output, name = self.run / EVALUATION / file.stem, step_name(self.step)
        settings = vars(self._sampling) | {"prompt_format": self.answers.prompt_format, "raw": self.answers.raw}
        _discard_others(output / f"{name}.jsonl", self.model, settings)
        result = evaluate_model(
            EvaluatedModel(name, self.model),
            read_benchmark(file, limit=self.answers.limit),
            output,
            settings=settings,
            samples=self._sampling.samples,
            make=lambda _: self._generator,
        )
        passes = {f"pass@{k}": result.pass_at(k) for k in self.answers.ks}
        write_json(output / f"{name}.json", self._described(result) | {k: asdict(v) for k, v in passes.items()})
        return {f"eval/{file.stem}/{k}": v.mean for k, v in passes.items()}

    def _described(self, result: Result) -> dict[str, Any]:
        weights = sampled_fingerprint(self.model, "*.safetensors")
        counts = {"problems": len(result.correct), "samples": result.samples, "cut_off": result.cut_off}
        return {"step": self.step, "weights": weights, **counts}

    def _samples(self, file: Path) -> None:
        prompts = read_prompts(file)
        answered = self._generator.answer([(prompt.number, prompt.prompt) for prompt in prompts])
        weigh = _Weigher.of(self)
        rows = [
            {"step": self.step, "number": prompt.number, "prompt": prompt.prompt, "expected": prompt.answer or None}
            | judged_answer(prompt, answer)
            | weigh(prompt, answer)
            for prompt, own in zip(prompts, answered, strict=True)
            for answer in own
        ]
        directory = self.run / SAMPLES
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / f"{step_name(self.step)}.jsonl", b"".join(map(encode, rows)).decode())


@dataclass(frozen=True)
class _Weigher:
    """The log-ratio per token and the weight that an answer would have in training."""

    answers: StepAnswers
    policy: Any
    reference: Any
    prompt_format: PromptFormat

    @staticmethod
    def of(answers: StepAnswers) -> _Weigher:
        policy, tokenizer = load_in_transformers(answers.model)
        reference = None if answers.reference is None else load_in_transformers(answers.reference)[0]
        prompt_format = PromptFormat(tokenizer, wrapper=answers.answers.prompt_format, raw=answers.answers.raw)
        return _Weigher(answers, policy, reference, prompt_format)

    def __call__(self, problem: Problem, answer: Answer) -> dict[str, float | None]:
        prompt = self.prompt_format(problem.prompt)
        ids = list(answer.ids)
        objective = self.answers.objective
        if not ids or not objective.weighted or (objective.needs_reference and self.reference is None):
            return {"log_ratio": None, "weight": None}
        policy = self._logprobs(self.policy, prompt, ids)
        reference = policy if self.reference is None else self._logprobs(self.reference, prompt, ids)
        segment, ones = torch.zeros(len(ids), dtype=torch.int64), torch.ones(len(ids))
        trajectories = Trajectories(
            logprobs=policy,
            proposal=policy,
            reference=reference,
            mask=ones,
            segment=segment,
            lengths=torch.tensor([float(len(ids))]),
            quality=torch.ones(1),
            segment_sum=local_segment_sum(segment, 1),
        )
        sums = micro_batch_loss(objective, trajectories, self.answers.settings).sums.tolist()
        named = dict(zip(sum_names(objective), sums, strict=True))
        return {"log_ratio": named["log_ratio"] / named["tokens"], "weight": named["weight"] / named["units"]}

    @staticmethod
    def _logprobs(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return hugging_face_logprobs(model, prompt + ids)[len(prompt) - 1 :]


def reference_directory(config: Config, run: Path) -> Path | None:
    """The reference as a Hugging Face directory, exported to RUN/evaluation/reference if it is a checkpoint.

    None for random weights and for a reference that is refreshed, which no directory holds.
    """
    source = config.reference.model or config.model.hf or config.model.checkpoint
    if source is None or config.reference.refresh or config.reference.source == "base":
        return None
    if (Path(source) / "config.json").exists():
        return Path(source)
    exported = run / EVALUATION / "reference"
    if not exported.exists():
        export_checkpoint(source, exported, exist_ok=True)
    return exported


def answer_for(run: Path, step: int) -> dict[str, float]:
    """Answer for a step of a run in a process of its own, from the model that the run has exported, and remove that.

    Without it, from the checkpoint of that step. Raises UserError.
    """
    config, name = load_config(run / "config.yaml"), step_name(step)
    if not config.evaluation.answers.wanted:
        raise ConfigError(f"{run}/config.yaml asks for no answers: add benchmarks or prompts to evaluation.answers.")
    model = model_directory(run, step)
    if not model.exists():
        export_checkpoint(run / CHECKPOINTS / name, model, exist_ok=True)
    section, objective = config.objective, find_objective(config.objective.name)
    low, high = section.clip or objective.clip_at(section.level)
    settings = Settings(section.level, section.temperature, (low, high), section.normalize)
    reference = reference_directory(config, run)
    found = StepAnswers(run, step, model, config.evaluation.answers, objective, settings, reference).all()
    shutil.rmtree(model, ignore_errors=True)
    return found


def answered(run: Path, step: int, answers: Answers) -> bool:
    """Whether all answers of a step are there."""
    name = step_name(step)
    results = [run / EVALUATION / Path(file).stem / f"{name}.json" for file in answers.benchmarks]
    samples = [run / SAMPLES / f"{name}.jsonl"] if answers.prompts else []
    return all(path.exists() for path in (*results, *samples))


def model_directory(run: Path, step: int) -> Path:
    """Where the policy of a step is exported for its answers, and removed from afterwards."""
    return run.absolute() / EVALUATION / "models" / step_name(step)


def _discard_others(path: Path, model: Path, settings: Mapping[str, Any]) -> None:
    """Remove answers of other weights or settings: of a step that was repeated after a rewind, or on resuming with other settings."""
    if path.exists():
        header = (read_json_lines(path)[0] or [{}])[0]
        weights = sampled_fingerprint(model, "*.safetensors")
        if (header.get("weights"), header.get("settings")) != (weights, dict(settings)):
            path.unlink()
