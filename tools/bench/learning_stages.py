"""The stages of tools/bench/learning.py: sampled answers, the filter, training in a job of processes, and evaluation."""

from __future__ import annotations

import json
import random
import resource
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learning_tasks import Record, Task

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import write_text

SEQ_LENGTH = 256
_SAMPLED_AT_ONCE = 500


def curated_corpus(
    directory: Path,
    reference: Path,
    tokenizer: Path,
    task: Task,
    *,
    count: int,
    share: float,
    seed: int,
    held_out: frozenset[str],
) -> tuple[Path, float]:
    """A reference's first `count` answers that pass the filter, as a corpus in `directory`; and the share of them that is right.

    The filter passes every right answer, and a wrong one with probability `share`. Raises DataError if it passes fewer than one of ten.
    """
    path = directory / "curated.jsonl"
    if not path.exists():
        rng = random.Random(seed)
        problems = list(task.problems(10 * count, seed=100 + seed, held_out=held_out))
        answers = sampled_answers(reference, [p["question"] for p in problems], task.answer_tokens, seed)
        kept: list[Record] = []
        for problem, text in zip(problems, answers, strict=True):
            right = text == problem["answer"]
            if text and (rng.random() < share or right):
                kept.append({**problem, "response": text, "right": right})
            if len(kept) == count:
                break
        if len(kept) < count:
            raise DataError(f"the filter keeps {len(kept)} of {len(problems)} answers, but {count} are needed.")
        write(path, lines(kept))
    records = read(path)
    corpus = shard(path, records, tokenizer)
    return corpus, statistics.fmean(r["right"] for r in records)


def sampled_answers(reference: Path, questions: Sequence[str], max_tokens: int, seed: int) -> Iterator[str]:
    """One answer per question, sampled at temperature 1: the distribution that importance weights are relative to."""
    import torch

    from megatron_iwsft.evaluate.generate import PromptFormat, stop_tokens
    from megatron_iwsft.hf.transformers_models import load_in_transformers

    model = exported(reference)
    assert model is not None
    policy, tokenizer = load_in_transformers(model)
    stops = set(stop_tokens(policy.generation_config, tokenizer))
    prompt = PromptFormat(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(questions), _SAMPLED_AT_ONCE):
        # All questions have as many tokens.
        tokens = torch.tensor([prompt(q) for q in questions[start : start + _SAMPLED_AT_ONCE]])
        cache, sampled = None, []
        with torch.inference_mode():
            for _ in range(max_tokens):
                step = policy(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = step.past_key_values
                tokens = torch.multinomial(torch.softmax(step.logits[:, -1].float(), -1), 1, generator=generator)
                sampled.append(tokens)
        for ids in torch.cat(sampled, 1).tolist():
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            yield tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def run_config(
    directory: Path,
    corpus: Path,
    batch: int,
    data: dict[str, Any],
    sections: dict[str, Any],
    lr: float,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The config of a run in `directory`, with further keys of its `data` section and further sections."""
    size = {"seq_length": SEQ_LENGTH, "micro_batch_size": batch, "global_batch_size": batch}
    return {
        "run": {"name": directory.name, "dir": str(directory), "seed": seed, "device": "cpu"},
        "data": {"corpus": str(corpus), **size, **data},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": lr, "schedule": "cosine", "weight_decay": 0.0},
        "checkpoint": {"every": 0},
        "export": {"at_end": True},
        "logging": {"every": 1000},
        **sections,
    }


def train_all(runs: Sequence[dict[str, Any]], processes: int = 1) -> float:
    """Train the configs whose export does not exist yet, tensor parallel, in one job of processes. Returns their CPU seconds."""
    import multiprocessing

    from megatron_iwsft.distributed.spawn import run_job

    missing = [run for run in runs if exported(Path(run["run"]["dir"])) is None]
    if not missing:
        return 0.0
    multiprocessing.set_forkserver_preload(["megatron_iwsft.train.trainer", "megatron_iwsft.train.precompute"])
    return sum(run_job(_train_all, processes, missing, start_method="forkserver", threads=1))


def _train_all(platform: Any, runs: Sequence[dict[str, Any]]) -> float:
    """Returns the CPU seconds of this process and those that it started."""
    import yaml

    from megatron_iwsft.config.loader import parse_config
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron
    from megatron_iwsft.objectives.custom import find_objective
    from megatron_iwsft.objectives.functions import OBJECTIVES
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    quiet_megatron()
    # Not as custom objectives, whose trajectories must not depend on each other: here the micro-batch is the global batch.
    OBJECTIVES |= controls()
    parallel = {"tensor": platform.world_size, "sequence": platform.world_size > 1}
    for run in runs:
        text = yaml.safe_dump({**run, "parallel": parallel}, allow_unicode=True)
        config = parse_config(text, [], where=run["run"]["name"])
        if find_objective(config.objective.name).needs_reference and config.reference.source == "cached":
            precompute_reference(config)
        train(config)
        if config.adapter.rank and platform.rank == 0:
            _merge(Path(config.run.dir))
    return cpu_seconds()


def cpu_seconds() -> float:
    """Of this process, and of those that it has started and waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def stop_fork_server() -> None:
    """Wait for the end of the server that forks the jobs' processes: only then are they among the processes waited for."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _merge(run: Path) -> None:
    """Export the model that a run's adapters make of their base."""
    from megatron_iwsft.checkpoint.info import CheckpointInfo
    from megatron_iwsft.convert.export import export_checkpoint

    export_checkpoint(run, run / "hf" / CheckpointInfo.read(run).directory.name, merge=True)


def controls() -> dict[str, Any]:
    """Objectives with the weights of iw-SFT, but not those of their trajectories: another's, or the mean of the batch."""
    import torch
    from torch import Tensor

    from megatron_iwsft.objectives.functions import Objective, Settings, Trajectories, Weighted, iw_sft

    def reassigned(change: Callable[[Tensor], Tensor]) -> Callable[[Trajectories, Settings], Weighted]:
        def function(t: Trajectories, s: Settings) -> Weighted:
            result = iw_sft.function(t, s)
            real = t.lengths > 0
            weights = t.segment_sum(result.weight) / t.lengths.clamp(min=1.0)
            weights[real] = change(weights[real])
            weight = weights[t.segment] * t.mask
            return replace(result, loss=-weight * t.logprobs, weight=weight)

        return function

    rolled = reassigned(lambda w: w.roll(1))
    mean = reassigned(lambda w: torch.full_like(w, float(w.mean())))
    return {
        "iw_sft_of_the_neighbour": Objective("iw_sft_of_the_neighbour", rolled),
        "iw_sft_mean": Objective("iw_sft_mean", mean),
    }


def exported(directory: Path) -> Path | None:
    """The Hugging Face directory that a run has written at its end."""
    return max((directory / "hf").glob("step-????????"), default=None)


def evaluate(run: Path, benchmark: Path, answers: Path, judged: Path, max_tokens: int) -> dict[str, float]:
    """What the export of a run answers, in shares of the problems; and the run's effective sample size, over its last tenth.

    exact, cool: the exact probability of the right answer at temperature 1 and 0.5, by teacher forcing on the corpus `answers`.
    greedy: through the project's evaluation, answers of at most `max_tokens` generated, judged, and written to `judged`.
    """
    stored = run / ("evaluation.json" if benchmark.stem == "problems" else f"evaluation-{benchmark.stem}.json")
    if not stored.exists():
        model = exported(run)
        assert model is not None
        exact, cool = _right_answer(model, answers)
        metrics = read(run / "metrics.jsonl")
        ess = [m["weight_ess"] for m in metrics[-max(1, len(metrics) // 10) :] if "weight_ess" in m]
        found = {"exact": exact, "cool": cool, "greedy": _greedy(model, run.name, benchmark, judged, max_tokens)}
        write(stored, json.dumps(found | ({"ess": statistics.fmean(ess)} if ess else {})) + "\n")
    return json.loads(stored.read_text(encoding="utf-8"))


def _right_answer(model: Path, answers: Path) -> tuple[float, float]:
    """Mean probability of all trained tokens of each of `answers` at temperature 1 and 0.5."""
    import torch

    from megatron_iwsft.data.corpus import Corpus
    from megatron_iwsft.hf.transformers_models import load_in_transformers

    policy, _ = load_in_transformers(model)
    corpus = Corpus.open(answers)
    tokens, mask = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(f(i).tolist()) for i in range(len(corpus))], batch_first=True)
        for f in (corpus.tokens, corpus.mask)
    )
    with torch.inference_mode():
        logits = policy(tokens).logits[:, :-1].float()
    out = []
    for temperature in (1.0, 0.5):
        logprobs = torch.log_softmax(logits / temperature, -1).gather(2, tokens[:, 1:, None])[..., 0]
        out.append(float((logprobs * mask[:, 1:]).sum(1).exp().mean()))
    return out[0], out[1]


def _greedy(model: Path, label: str, benchmark: Path, judged: Path, max_tokens: int) -> float:
    from megatron_iwsft.evaluate.benchmark import read_benchmark
    from megatron_iwsft.evaluate.generate import Sampling, TransformersGenerator
    from megatron_iwsft.evaluate.run import EvaluatedModel, evaluate_model

    sampling = Sampling(temperature=0.0, max_new_tokens=max_tokens)
    result = evaluate_model(
        EvaluatedModel(label, model),
        read_benchmark(benchmark),
        judged,
        settings=vars(sampling),
        samples=1,
        make=lambda directory: TransformersGenerator(directory, sampling, batch_size=500),
    )
    return sum(result.correct) / len(result.correct)


def shard(path: Path, records: Iterable[Record], tokenizer: Path) -> Path:
    """Write records as JSONL to `path`, unless it exists, and shard them into a corpus next to it."""
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus

    if not path.exists():
        write(path, lines(records))
    corpus = path.with_name(path.name.removesuffix(".jsonl"))
    if not (corpus / "manifest.json").exists():
        settings = ShardSettings(str(tokenizer), template="plain", record=RecordFormat(prompt_field="question"))
        shard_corpus([path], corpus, settings, show_progress=False)
    return corpus


def lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
