"""Parity: one text's log-probs in `transformers` and in a checkpoint's Megatron-Core model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.config.schema import Model
from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model, forward
from megatron_iwsft.utils.text import say


@dataclass(frozen=True)
class Parity:
    """Log-probs of one text of `tokens` tokens under both models.

    worst          position of the largest difference
    theirs, ours   log-probs of the token there, in `transformers` and in Megatron-Core
    """

    tokens: int
    max_difference: float
    mean_difference: float
    worst: int
    worst_token: str
    theirs: float
    ours: float


_LONGEST = 16384  # tokens compared by default; beyond that, a large model on CPU takes hours


def verify(
    hf_directory: str | Path,
    source: str | Path,
    text: str,
    *,
    lengths: Sequence[int] | None = None,
    limit_s: float | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Parity]:
    """Compare the log-probs of every token under `transformers` and under the checkpoint's Megatron-Core model, in fp32 on CPU.

    The text is compared once as it is, and repeated to a little beyond the model's context length, its context length before rope
    scaling, and its sliding window (up to 16,384 tokens); or repeated to each of `lengths` tokens. Megatron-Core runs in a process
    of its own, and shorter texts come first. limit_s: seconds after which no further length is begun; those that were compared in both
    are returned. report: receives a sentence as each part begins. Raises CheckpointError or DataError.
    """
    deadline = math.inf if limit_s is None else time.time() + limit_s
    info = CheckpointInfo.read(source)
    report(f"loading {hf_directory} in transformers")
    model, tokenizer = load_in_transformers(hf_directory)
    once = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(once) < 2:
        raise DataError(
            f"the text {text!r} has {len(once)} tokens; at least 2 are needed. Give a longer --text or --length."
        )
    if lengths is None:
        longest = min(_LONGEST, info.architecture.longest or _LONGEST)
        lengths = [len(once), *(n + 64 for n in _context_lengths(info.architecture.hf) if n + 64 <= longest)]
    encoded = [(once * -(-n // len(once)))[:n] for n in sorted(set(lengths))]
    with torch.no_grad():
        of_theirs = partial(hugging_face_logprobs, model)
        expected = _until(deadline, encoded, of_theirs, where="transformers", report=report)
    del model, of_theirs
    found: list[Tensor] = []
    if expected:
        (found,) = run_job(_checkpoint_logprobs, 1, str(info.directory), encoded[: len(expected)], deadline)
    compared = list(zip(encoded, expected, found, strict=False))
    if not compared:
        raise CheckpointError(
            f"no text was compared within {limit_s:g} s; the shortest has {len(encoded[0])} tokens. Raise --time-limit."
        )
    if len(compared) < len(encoded):
        left_out = ", ".join(f"{len(ids):,}" for ids in encoded[len(compared) :])
        report(f"not compared within {limit_s:g} s: {left_out} tokens. Raise --time-limit, or choose --length")
    return [_compare(ids, a, b, tokenizer) for ids, a, b in compared]


def _until(
    deadline: float,
    texts: list[list[int]],
    logprobs: Callable[[list[int]], Tensor],
    *,
    where: str,
    report: Callable[[str], None],
) -> list[Tensor]:
    """Log-probs of each text that is begun before the deadline, by `time.time`."""
    out: list[Tensor] = []
    for ids in texts:
        if time.time() >= deadline:
            break
        report(f"{where}: {len(ids):,} tokens ({len(out) + 1} of {len(texts)})")
        out.append(logprobs(ids))
    return out


def _checkpoint_logprobs(platform: Platform, directory: str, texts: list[list[int]], deadline: float) -> list[Tensor]:
    """Log-probs of each text under a checkpoint's model, in fp32."""
    weights, parallel = InitialWeights(Model(checkpoint=directory), seed=0), platform.parallel()
    chunks = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    weights.load(chunks, parallel)
    return _until(deadline, texts, partial(checkpoint_logprobs, chunks[0]), where="Megatron-Core", report=say)


def _compare(ids: list[int], theirs: Tensor, ours: Tensor, tokenizer: Any) -> Parity:
    difference = (ours - theirs).abs()
    worst = int(difference.argmax())  # NaN counts as the largest
    return Parity(
        tokens=len(ids),
        max_difference=float(difference[worst]),
        mean_difference=float(difference.mean()),
        worst=worst + 1,
        worst_token=tokenizer.decode([ids[worst + 1]]),
        theirs=float(theirs[worst]),
        ours=float(ours[worst]),
    )


def _context_lengths(config: dict[str, Any]) -> list[int]:
    """Lengths at which a model's computation changes, as far as its Hugging Face config names any."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    candidates = [
        rope.get("original_max_position_embeddings"),
        config.get("original_max_position_embeddings"),
        config.get("sliding_window"),
        config.get("max_position_embeddings"),
    ]
    return [n for n in candidates if isinstance(n, int)]


def checkpoint_logprobs(model: PolicyModel, ids: list[int]) -> Tensor:
    """log π(token t | before) for t = 1 …, float32 [n−1], from a Megatron-Core model that this process holds entirely."""
    n = len(ids)
    batch = Batch(
        tokens=torch.tensor([ids]),
        labels=torch.tensor([[*ids[1:], IGNORE]]),
        position_ids=torch.arange(n)[None],
        segment=torch.zeros(n, dtype=torch.int64),
        reference=None,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        max_seqlen=n,
        lengths=torch.tensor([n - 1.0]),
        quality=torch.ones(1),
        trajectory=torch.zeros(1, dtype=torch.int64),
    )
    with torch.no_grad():
        return forward(model, batch)[0, :-1]
