"""Checkpoints ↔ Hugging Face directories, in one process on CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_iwsft.checkpoint import info as checkpoint
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Model
from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.directory import DTYPES, write_directory
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles


def export_checkpoint(source: str | Path, output: str | Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint made at any layout as a Hugging Face directory; returns `output`.

    Holds one parameter in memory at a time. dtype: fp32, bf16 or fp16; None keeps the run's. The padded vocabulary is left
    out; tokenizer, chat template and generation config come along. Raises CheckpointError; no partial directory stays behind.
    """
    info = checkpoint.CheckpointInfo.read(source)
    _give_freed_memory_back()
    read, names = checkpoint.hugging_face_reader(info.directory, info.architecture)
    supporting_files = SupportingFiles(
        sorted((info.directory / checkpoint.TOKENIZER).glob("*")),
        Provenance(info.step, info.config, info.corpus, info.template_hash),
    )
    write_directory(
        Path(output),
        info.architecture,
        read,
        names=names,
        dtype=DTYPES[dtype or info.config.get("precision", {}).get("dtype", "fp32")],
        finish=lambda partial: supporting_files.write(partial, info.architecture),
    )
    return Path(output)


def _give_freed_memory_back() -> None:
    """Have the C library return blocks of 1 MB and more to the system when they are freed.

    glibc otherwise keeps blocks of up to 32 MB for later, and a hundred tensors of various sizes make it keep many.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such option
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def export_running(
    chunks: list[Any],
    parallel: ParallelContext,
    output: Path,
    supporting_files: SupportingFiles,
    *,
    dtype: torch.dtype,
) -> None:
    """Write a model as it stands in training, whatever the layout, as a Hugging Face directory; nothing if there is one already.

    Collective over all ranks: rank 0 writes, holding one whole parameter at a time; the others send it their shards.
    """
    from megatron_iwsft.convert.gather import RunningWeights

    there = [output.exists()]
    dist.broadcast_object_list(there, src=0)
    if there[0]:
        return
    weights = RunningWeights(chunks, parallel)
    if dist.get_rank() == 0:
        architecture = weights.architecture
        write_directory(
            output,
            architecture,
            weights.read,
            names=weights.names,
            dtype=dtype,
            finish=lambda partial: supporting_files.write(partial, architecture),
        )
    else:
        weights.serve()
    dist.barrier()


def import_directory(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp32",
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
) -> Path:
    """Write a Hugging Face directory as a checkpoint (step 0, weights only) under `output`; returns the checkpoint.

    Each rank reads, holds and writes its own part of the model under the given layout. Collective over all ranks.
    """
    from megatron_iwsft.distributed.context import start
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.train.setup import Weights

    if (Path(output) / checkpoint.LATEST).exists():
        raise CheckpointError(f"{output} already holds checkpoints. Choose another --output.")
    weights = Weights(Model(hf=str(source)), seed=0)
    platform = start("cpu")
    parallel = platform.parallel(tensor=tensor, pipeline=pipeline, expert=expert)
    chunks = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=DTYPES[dtype]))
    weights.load(chunks, parallel)
    writer = CheckpointWriter(
        Path(output),
        architecture=weights.architecture,
        config={"model": {"hf": str(source)}, "precision": {"dtype": dtype}},
        layout={"tensor": tensor, "pipeline": pipeline, "expert": expert, "data": parallel.dp.size()},
        tokenizer_files=weights.tokenizer_files,
    )
    return writer.save(0, [_Movable(chunk) for chunk in chunks])


class _Movable:
    """A model that is saved for the last time: its state dict takes the parameters' memory over.

    Megatron-Core stores a fused parameter as its parts, and its writer copies parts that are views, all of them before it writes
    the first: for the fused gate and up projections alone a third of a model. Here each is copied and freed in turn.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories

        parameters = {p.data_ptr(): p for p in self._model.parameters()}
        state = self._model.sharded_state_dict(metadata=metadata)
        for name, entry in state.items():
            fused = parameters.get(entry.data.data_ptr()) if isinstance(entry, ShardedTensorFactory) else None
            if fused is not None:
                parts = {name: entry}
                apply_factories(parts)
                for part in parts[name] if isinstance(parts[name], list) else parts[name].values():
                    part.data = part.data.clone()
                fused.data = torch.empty(0)
                state[name] = parts[name]
        return state


@dataclass(frozen=True)
class Parity:
    """Log-probs of one text under both models.

    worst: the position of the largest difference, of `tokens` in all; theirs and ours are the log-probs of the token there.
    """

    tokens: int
    max_difference: float
    mean_difference: float
    worst: int
    worst_token: str
    theirs: float
    ours: float


_LONGEST = 16384  # of the texts that are compared unasked: beyond that, a large model on CPU takes hours


def verify(
    hf_directory: str | Path, source: str | Path, text: str, *, lengths: Sequence[int] | None = None
) -> list[Parity]:
    """Compare the log-probs of every token under `transformers` and under the checkpoint's Megatron-Core model, in fp32.

    The text is compared as it is, and repeated to a little beyond the model's context length, the one before its rotary positions
    were scaled, and its sliding window (as far as those are at most 16,384 tokens); or repeated to each of `lengths` tokens.
    """
    from megatron_iwsft.distributed.context import start
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.train.setup import Weights

    info = checkpoint.CheckpointInfo.read(source)
    theirs, tokenizer = load_in_transformers(hf_directory)
    once = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(once) < 2:
        raise DataError(f"the text {text!r} has {len(once)} tokens; at least 2 are needed.")
    if lengths is None:
        lengths = [len(once), *(n + 64 for n in _context_lengths(info.architecture.hf) if n + 64 <= _LONGEST)]
    encoded = [(once * -(-n // len(once)))[:n] for n in sorted(set(lengths))]
    with torch.no_grad():
        expected = [hugging_face_logprobs(theirs, ids) for ids in encoded]
    del theirs

    platform = start("cpu")
    parallel = platform.parallel()
    chunks = build_model(info.architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    Weights(Model(checkpoint=str(info.directory)), seed=0).load(chunks, parallel)
    out = []
    for ids, want in zip(encoded, expected, strict=True):
        found = checkpoint_logprobs(chunks[0], ids)
        difference = (found - want).abs()
        worst = int(difference.argmax())  # a NaN counts as the largest
        out.append(
            Parity(
                tokens=len(ids),
                max_difference=float(difference[worst]),
                mean_difference=float(difference.mean()),
                worst=worst + 1,
                worst_token=tokenizer.decode([ids[worst + 1]]),
                theirs=float(want[worst]),
                ours=float(found[worst]),
            )
        )
    return out


def _context_lengths(config: dict[str, Any]) -> list[int]:
    """Lengths at which a model starts to compute differently, as far as its Hugging Face config names any."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    candidates = [
        rope.get("original_max_position_embeddings"),
        config.get("original_max_position_embeddings"),
        config.get("sliding_window"),
        config.get("max_position_embeddings"),
    ]
    return [n for n in candidates if isinstance(n, int)]


def load_in_transformers(directory: str | Path, *, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face directory. Raises CheckpointError if `transformers` cannot load it.

    Only safetensors are read and no code of the directory is run. dtype "auto" is the one that the weights are stored in.
    """
    import transformers

    tokenizer = load_tokenizer_in_transformers(directory)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {error}") from None
    return model.eval(), tokenizer


def load_tokenizer_in_transformers(directory: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory. Raises CheckpointError if `transformers` cannot load it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (Path(directory) / "config.json").exists():
        raise CheckpointError(f"{directory} is not a Hugging Face model directory: it has no config.json.")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} has no tokenizer that transformers can load: {error}") from None


def hugging_face_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """log π(token t | before) for t = 1 …, float32 [n−1], from a `transformers` model; at most 1,024 rows of logits at once."""
    tokens = torch.tensor([ids])
    hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
    parts = []
    for part, targets in zip(hidden.split(1024), tokens[0, 1:].split(1024), strict=True):
        logits = model.get_output_embeddings()(part).float()
        parts.append(torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def checkpoint_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """The same from one whole Megatron-Core model on CPU."""
    from megatron_iwsft.model.gpt import forward

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
        trajectory=torch.from_numpy(np.zeros(1, np.int64)),
    )
    with torch.no_grad():
        return -forward(model, batch)[0, :-1]
