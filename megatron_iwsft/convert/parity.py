"""Parity: one text's log-probs in `transformers` and in a checkpoint's Megatron-Core model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from megatron_iwsft.errors import DataError
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model, forward


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
    hf_directory: str | Path, source: str | Path, text: str, *, lengths: Sequence[int] | None = None
) -> list[Parity]:
    """Compare the log-probs of every token under `transformers` and under the checkpoint's Megatron-Core model, in fp32 on CPU.

    The text is compared once as it is, and repeated to a little beyond the model's context length, its context length before rope
    scaling, and its sliding window (up to 16,384 tokens); or repeated to each of `lengths` tokens. Megatron-Core runs in a process
    of its own. Raises CheckpointError or DataError.
    """
    info = CheckpointInfo.read(source)
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
        expected = [hugging_face_logprobs(model, ids) for ids in encoded]
    del model
    (found,) = run_job(_checkpoint_logprobs, 1, str(info.directory), encoded)
    return [_compare(ids, a, b, tokenizer) for ids, a, b in zip(encoded, expected, found, strict=True)]


def _checkpoint_logprobs(platform: Platform, directory: str, texts: list[list[int]]) -> list[Tensor]:
    """Log-probs of each text under a checkpoint's model, in fp32."""
    weights, parallel = InitialWeights(Model(checkpoint=directory), seed=0), platform.parallel()
    chunks = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    weights.load(chunks, parallel)
    return [checkpoint_logprobs(chunks[0], ids) for ids in texts]


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
