"""The references of tools/bench/learning.py: one that errs at random, and one that is wrong by conviction."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learning_stages import SEQ_LENGTH, exported, lines, run_config, shard, train_all, write
from learning_tasks import Record, Task

ERRS_AT_RANDOM, WRONG_BY_CONVICTION = "errs at random", "wrong by conviction"
REFERENCES = {ERRS_AT_RANDOM: "reference-random", WRONG_BY_CONVICTION: "reference-conviction"}


@dataclass(frozen=True)
class Size:
    """Sizes of one task's tables. Batches are in packed sequences of 256 tokens.

    pretrained      SmolLM2-135M-Instruct learns the lessons, instead of a model of two layers that is trained from random weights
    random_errors   share of the first reference's demonstrations that have one wrong digit
    reference_lr    of the first reference
    rates           learning rates to try
    """

    task: Task
    pretrained: bool = False
    random_errors: float = 0.5
    hidden_size: int = 96
    reference_steps: int = 2500
    lesson_steps: int = 300
    reference_batch: int = 8
    reference_lr: float = 3e-3
    lessons_lr: float = 5e-4
    tuning_batch: int = 4
    problems: int = 400
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)


def train_references(home: Path, size: Size, names: Iterable[str], held_out: frozenset[str]) -> float:
    """Train the references that `names` need, in `home`. The one that is wrong by conviction continues the other on the task's lessons.

    Returns the CPU seconds that it took.
    """
    cpu_s = 0.0
    if size.pretrained:
        start = {"hf": str(_pretrained(home))}
    else:
        first, count = home / REFERENCES[ERRS_AT_RANDOM], _count(size, size.reference_steps)
        start = {"checkpoint": str(first)}
        if exported(first) is None:
            records = list(size.task.problems(count, wrong=size.random_errors, seed=0, held_out=held_out))
            _train_tokenizer(home, records[:200])
            model = {"config": _two_layers(size.hidden_size)}
            cpu_s += _train(first, model, records, size, size.reference_steps, size.reference_lr)
    second = home / REFERENCES[WRONG_BY_CONVICTION]
    if WRONG_BY_CONVICTION in names and exported(second) is None:
        lessons = size.task.lessons(_count(size, size.lesson_steps), seed=1, held_out=held_out)
        cpu_s += _train(second, start, lessons, size, size.lesson_steps, size.lessons_lr)
    return cpu_s


def _count(size: Size, steps: int) -> int:
    """Records for so many steps."""
    return steps * size.reference_batch * (SEQ_LENGTH // size.task.tokens)


def _train(
    directory: Path, start: dict[str, Any], records: Iterable[Record], size: Size, steps: int, lr: float
) -> float:
    home = directory.parent
    corpus = shard(home / f"{directory.name}-demonstrations.jsonl", records, home / "tokenizer")
    sections = {"model": start, "objective": {"name": "sft"}}
    run = run_config(directory, corpus, size.reference_batch, {"max_steps": steps}, sections, lr)
    return train_all([run])


def _pretrained(home: Path) -> Path:
    """The directory of SmolLM2-135M-Instruct; its tokenizer becomes the one of `home`. Raises DataError where it cannot be fetched."""
    from real_inputs import Unavailable, smollm2

    from megatron_iwsft.errors import DataError

    try:
        directory = smollm2()
    except Unavailable as error:
        raise DataError(f"SmolLM2-135M-Instruct is needed: {error}.") from None
    (home / "tokenizer").mkdir(parents=True, exist_ok=True)
    for path in (*directory.glob("*token*"), *directory.glob("*.jinja")):
        shutil.copy(path, home / "tokenizer")
    return directory


def _train_tokenizer(home: Path, records: Sequence[Record]) -> None:
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    if not (home / "tokenizer").exists():
        # Include the words of the template, so that each is one or two tokens.
        texts = ({"text": f"Question: {r['question']}\nAnswer: {r['response']}"} for r in records)
        write(home / "texts.jsonl", lines(texts))
        train_tokenizer([home / "texts.jsonl"], home / "tokenizer", fields=["text"], vocab_size=300)


def _two_layers(hidden_size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": SEQ_LENGTH,
        "tie_word_embeddings": True,
    }
