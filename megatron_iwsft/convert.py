"""Checkpoints ↔ Hugging Face directories, in one process on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_iwsft import checkpoint
from megatron_iwsft.batch import IGNORE, Batch
from megatron_iwsft.checkpoint_writer import CheckpointWriter
from megatron_iwsft.config import Model
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.model.hf import DTYPES, write_directory
from megatron_iwsft.version import __version__


def export_checkpoint(source: str | Path, output: str | Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint made at any layout as a Hugging Face directory; returns `output`.

    Holds one parameter in memory at a time. dtype: fp32, bf16 or fp16; None keeps the run's. The padded vocabulary is left
    out; tokenizer and chat template come along. Raises CheckpointError; no partial directory stays behind.
    """
    info = checkpoint.CheckpointInfo.read(source)
    read, names = checkpoint.hugging_face_reader(info.directory, info.architecture)
    chosen = dtype or info.config.get("precision", {}).get("dtype", "fp32")
    write_directory(
        Path(output),
        info.architecture,
        read,
        names=names,
        dtype=DTYPES[chosen],
        extra_files=sorted((info.directory / checkpoint.TOKENIZER).glob("*")),
        card=_model_card(info),
    )
    return Path(output)


def import_directory(source: str | Path, output: str | Path, *, dtype: str = "fp32") -> Path:
    """Write a Hugging Face directory as a checkpoint (step 0, weights only) under `output`; returns the checkpoint."""
    from megatron_iwsft.job import Weights
    from megatron_iwsft.model.build import ModelSettings, build_model
    from megatron_iwsft.platform import start

    if (Path(output) / checkpoint.LATEST).exists():
        raise CheckpointError(f"{output} already holds checkpoints. Choose another --output.")
    weights = Weights(Model(hf=str(source)), seed=0)
    platform = start("cpu")
    parallel = platform.parallel()
    chunks = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=DTYPES[dtype]))
    weights.load(chunks, parallel)
    writer = CheckpointWriter(
        Path(output),
        architecture=weights.architecture,
        config={"model": {"hf": str(source)}, "precision": {"dtype": dtype}},
        layout={},
        tokenizer_files=weights.tokenizer_files,
    )
    return writer.save(0, chunks)


@dataclass(frozen=True)
class Parity:
    """Log-probs of one text under both models. worst is the position of the largest difference, of `tokens` in all."""

    tokens: int
    max_difference: float
    worst: int
    worst_token: str


def verify(hf_directory: str | Path, source: str | Path, texts: Sequence[str]) -> list[Parity]:
    """Compare the log-probs of every token of `texts` under `transformers` and under the checkpoint's Megatron-Core model, in fp32."""
    from megatron_iwsft.job import Weights
    from megatron_iwsft.model.build import ModelSettings, build_model
    from megatron_iwsft.platform import start

    info = checkpoint.CheckpointInfo.read(source)
    theirs, tokenizer = load_in_transformers(hf_directory)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    with torch.no_grad():
        expected = [hugging_face_logprobs(theirs, ids) for ids in encoded]
    del theirs

    platform = start("cpu")
    parallel = platform.parallel()
    chunks = build_model(info.architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    Weights(Model(checkpoint=str(info.directory)), seed=0).load(chunks, parallel)
    out = []
    for ids, want in zip(encoded, expected, strict=True):
        difference = (checkpoint_logprobs(chunks[0], ids) - want).abs()
        worst = int(difference.argmax())
        out.append(Parity(len(ids), float(difference[worst]), worst + 1, tokenizer.decode([ids[worst + 1]])))
    return out


def load_in_transformers(directory: str | Path) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of a Hugging Face directory. Raises CheckpointError if `transformers` cannot load it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (Path(directory) / "config.json").exists():
        raise CheckpointError(f"{directory} is not a Hugging Face model directory: it has no config.json.")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        return model, transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {error}") from None


def hugging_face_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """log π(token t | before) for t = 1 …, float32 [n−1], from full logits of a `transformers` model."""
    tokens = torch.tensor([ids])
    logits = model(tokens).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None])[:, 0]


def checkpoint_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """The same from one whole Megatron-Core model on CPU."""
    from megatron_iwsft.model.build import forward

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


def _model_card(info: checkpoint.CheckpointInfo) -> str:
    """Where the weights come from, for people."""
    config = info.config
    run, objective, data = (config.get(key, {}) for key in ("run", "objective", "data"))
    lines = [
        "---",
        "library_name: transformers",
        "---",
        f"# {run.get('name', info.directory.name)}",
        "",
        f"Exported by megatron_iwsft {__version__} from step {info.step}.",
    ]
    facts = {
        "objective": " ".join(str(objective[k]) for k in ("name", "level", "normalize") if k in objective),
        "corpus": data.get("corpus"),
        "trained from": next((v for v in (config.get("model") or {}).values() if isinstance(v, str)), None),
        "chat template hash": info.template_hash,
    }
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items() if value)]
    return "\n".join(lines) + "\n"
