"""The stages of tools/bench/learning.py: references, their answers, the filter, training in a job of processes, and evaluation."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import write_text

ERRS_AT_RANDOM, WRONG_BY_CONVICTION = "errs at random", "wrong by conviction"
REFERENCES = {ERRS_AT_RANDOM: "reference-random", WRONG_BY_CONVICTION: "reference-conviction"}
_SEQ_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """Sizes of one table. Batches are in packed sequences of 256 tokens.

    random_errors   share of the first reference's demonstrations that have one wrong digit
    conviction      share of the second reference's further demonstrations that add without carrying
    spare           answers that are sampled for each one that is trained on
    """

    digits: int = 3
    random_errors: float = 0.5
    conviction: float = 0.67
    hidden_size: int = 96
    reference_steps: int = 2500
    conviction_steps: int = 300
    reference_batch: int = 8
    reference_lr: float = 3e-3
    spare: float = 2.5
    tuning_batch: int = 4
    problems: int = 400
    processes: int = 2


def train_references(output: Path, size: Size, names: Iterable[str], held_out: frozenset[str]) -> float:
    """Train the two-layer references that `names` need: the second continues the first on demonstrations that do not carry.

    Returns the CPU seconds that it took.
    """
    from megatron_iwsft.data.prepare.arithmetic import short_sums
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    # With the words of the template, a sum of n digits has 3 n + 11 tokens.
    per_step = size.reference_batch * (_SEQ_LENGTH // (3 * size.digits + 11))

    def demonstrations(steps: int, **options: Any) -> Iterator[dict[str, Any]]:
        return short_sums(steps * per_step, digits=size.digits, held_out=held_out, **options)

    first = list(demonstrations(size.reference_steps, wrong=size.random_errors, seed=0))
    if not (output / "tokenizer").exists():
        # Include the words of the template, so that each is one or two tokens.
        texts = ({"text": f"Question: {r['question']}\nAnswer: {r['response']}"} for r in first[:200])
        write(output / "texts.jsonl", lines(texts))
        train_tokenizer([output / "texts.jsonl"], output / "tokenizer", fields=["text"], vocab_size=300)
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

    def train_reference(
        name: str, start: dict[str, Any], records: list[dict[str, Any]], steps: int, lr: float
    ) -> float:
        corpus = shard(output / f"{REFERENCES[name]}-demonstrations.jsonl", records, output / "tokenizer")
        data = {"max_steps": steps, **_batches(corpus, size.reference_batch)}
        run = {"model": start, "data": data, "objective": {"name": "sft"}}
        return train_all([_run(output / REFERENCES[name], run, lr, seed=0)], size.processes)

    cpu_s = train_reference(ERRS_AT_RANDOM, {"config": model}, first, size.reference_steps, size.reference_lr)
    if WRONG_BY_CONVICTION in names:
        rng = random.Random(1)
        second = [
            {**r, "response": without_carrying(r["question"])} if rng.random() < size.conviction else r
            for r in demonstrations(size.conviction_steps, wrong=0.0, seed=1)
        ]
        start = {"checkpoint": str(output / REFERENCES[ERRS_AT_RANDOM])}
        cpu_s += train_reference(WRONG_BY_CONVICTION, start, second, size.conviction_steps, size.reference_lr / 6)
    return cpu_s


def without_carrying(question: str) -> str:
    """The wrong strategy: every pair of digits is added modulo 10, the highest digit is 0."""
    a, b = question.rstrip("=").split("+")
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True)) + "0"


def curated_corpus(
    output: Path,
    home: Path,
    reference: str,
    size: Size,
    *,
    count: int,
    share: float,
    seed: int,
    held_out: frozenset[str],
) -> tuple[Path, float]:
    """`count` of a reference's sampled answers that pass the filter, as a corpus; and the share of them that is right.

    The filter passes every right answer, and a wrong one with probability `share`.
    """
    from megatron_iwsft.data.prepare.arithmetic import short_sums

    path = home / "curated.jsonl"
    if not path.exists():
        prompts = round(size.spare * count)
        problems = list(short_sums(prompts, digits=size.digits, wrong=0.0, seed=100 + seed, held_out=held_out))
        texts = sampled_answers(exported(output / REFERENCES[reference]), [p["question"] for p in problems], seed)
        rng = random.Random(seed)
        answers = [{**p, "response": t, "right": t == p["answer"]} for p, t in zip(problems, texts, strict=True)]
        kept = [a for a in answers if a["response"] and (rng.random() < share or a["right"])]
        if len(kept) < count:
            raise DataError(
                f"the filter keeps {len(kept)} of {prompts} answers, but {count} are needed. Raise `spare`."
            )
        write(path, lines(kept[:count]))
    records = read(path)
    corpus = shard(path, records, output / "tokenizer")
    return corpus, statistics.fmean(r["right"] for r in records)


def sampled_answers(model: Path, questions: Sequence[str], seed: int) -> list[str]:
    """One answer per question, sampled at temperature 1: the distribution that importance weights are relative to."""
    import torch

    from megatron_iwsft.evaluate.generate import PromptFormat, stop_tokens
    from megatron_iwsft.hf.transformers_models import load_in_transformers

    policy, tokenizer = load_in_transformers(model)
    prompts = torch.tensor([PromptFormat(tokenizer)(q) for q in questions])  # all sums have as many tokens
    stops = set(stop_tokens(policy.generation_config, tokenizer))
    generator = torch.Generator().manual_seed(seed)
    out = []
    with torch.inference_mode():
        for tokens in prompts.split(1000):
            for _ in range(8):
                probabilities = torch.softmax(policy(tokens).logits[:, -1].float(), -1)
                tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
            for ids in tokens[:, prompts.shape[1] :].tolist():
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
                out.append(tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return out


def tuning_run(
    directory: Path,
    reference: Path,
    corpus: Path,
    sections: dict[str, Any],
    size: Size,
    *,
    epochs: int,
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """The config of one fine-tuning; `sections`: its `objective`, and a `reference` if not the default."""
    data = {"epochs": epochs, "drawn_from": "reference_filtered", **_batches(corpus, size.tuning_batch)}
    return _run(directory, {"model": {"checkpoint": str(reference)}, "data": data, **sections}, lr, seed=seed)


def _batches(corpus: Path, batch: int) -> dict[str, Any]:
    return {"corpus": str(corpus), "seq_length": _SEQ_LENGTH, "micro_batch_size": batch, "global_batch_size": batch}


def _run(directory: Path, sections: dict[str, Any], lr: float, *, seed: int) -> dict[str, Any]:
    return {
        "run": {"name": directory.name, "dir": str(directory), "seed": seed, "device": "cpu"},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": lr, "schedule": "cosine", "weight_decay": 0.0},
        "checkpoint": {"every": 0},
        "export": {"at_end": True},
        "logging": {"every": 1000},
        **sections,
    }


def train_all(runs: Sequence[dict[str, Any]], processes: int) -> float:
    """Train the configs whose export does not exist yet, tensor parallel, in one job of processes. Returns their CPU seconds."""
    import multiprocessing

    from megatron_iwsft.distributed.spawn import run_job

    missing = [run for run in runs if exported(Path(run["run"]["dir"])) is None]
    if not missing:
        return 0.0
    multiprocessing.set_forkserver_preload(["megatron_iwsft.train.trainer", "megatron_iwsft.train.precompute"])
    return sum(run_job(_train_all, processes, missing, start_method="forkserver", threads=1))


def _train_all(platform: Any, runs: Sequence[dict[str, Any]]) -> float:
    """Returns this process's CPU seconds."""
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
    return time.process_time()


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


def evaluate(run: Path, benchmark: Path, answers: Path, home: Path) -> dict[str, float]:
    """What the export of a run answers, in shares of the problems; and the run's effective sample size, over its last tenth.

    exact, cool: the exact probability of the right answer at temperature 1 and 0.5, by teacher forcing on the corpus `answers`.
    greedy: through the project's evaluation, answers generated and judged.
    """
    stored = run / "evaluation.json"
    if not stored.exists():
        model = exported(run)
        assert model is not None
        exact, cool = _right_answer(model, answers)
        metrics = read(run / "metrics.jsonl")
        ess = [m["weight_ess"] for m in metrics[-max(1, len(metrics) // 10) :] if "weight_ess" in m]
        found = {"exact": exact, "cool": cool, "greedy": _greedy(model, run.name, benchmark, home)}
        write(stored, json.dumps(found | ({"ess": statistics.fmean(ess)} if ess else {})) + "\n")
    return json.loads(stored.read_text(encoding="utf-8"))


def _right_answer(model: Path, answers: Path) -> tuple[float, float]:
    """Mean probability of the trained tokens of `answers` at temperature 1 and 0.5."""
    import torch

    from megatron_iwsft.data.corpus import Corpus
    from megatron_iwsft.hf.transformers_models import load_in_transformers

    policy, _ = load_in_transformers(model)
    corpus = Corpus.open(answers)
    tokens, mask = (torch.tensor([f(i).tolist() for i in range(len(corpus))]) for f in (corpus.tokens, corpus.mask))
    with torch.inference_mode():
        logits = policy(tokens).logits[:, :-1].float()
    out = []
    for temperature in (1.0, 0.5):
        logprobs = torch.log_softmax(logits / temperature, -1).gather(2, tokens[:, 1:, None])[..., 0]
        out.append(float((logprobs * mask[:, 1:]).sum(1).exp().mean()))
    return out[0], out[1]


def _greedy(model: Path, label: str, benchmark: Path, home: Path) -> float:
    from megatron_iwsft.evaluate.benchmark import read_benchmark
    from megatron_iwsft.evaluate.generate import Sampling, TransformersGenerator
    from megatron_iwsft.evaluate.run import EvaluatedModel, evaluate_model

    sampling = Sampling(temperature=0.0, max_new_tokens=8)
    result = evaluate_model(
        EvaluatedModel(label, model),
        read_benchmark(benchmark),
        home / "answers",
        settings=vars(sampling),
        samples=1,
        make=lambda directory: TransformersGenerator(directory, sampling, batch_size=500),
    )
    return sum(result.correct) / len(result.correct)


def shard(path: Path, records: list[dict[str, Any]], tokenizer: Path) -> Path:
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
