"""Import: a Hugging Face directory, or the weights of a Megatron-LM checkpoint, as a checkpoint."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from megatron_iwsft.checkpoint.initial_weights import load_from
from megatron_iwsft.checkpoint.megatron import MegatronCheckpoint
from megatron_iwsft.checkpoint.names import LATEST
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import DTYPES, SafetensorsDirectory, tokenizer_files
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model


def import_directory(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp32",
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    megatron: str | Path | None = None,
) -> Path:
    """Write a Hugging Face directory as a checkpoint (step 0, weights only) under `output`; returns the checkpoint.

    megatron: a torch_dist checkpoint of Megatron-LM or Megatron-Bridge, or a directory of several, of which the last is taken: it has the
    weights, and `source` then needs none.

    Starts pipeline × lcm(tensor, expert) processes, each of which reads, holds and writes its own part of the model; the calling
    process is not changed. Raises CheckpointError or ConfigError, and then leaves nothing.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError("`iwsft import` starts its own processes. Run it without torchrun.")
    _open(source, megatron)  # before processes are started, which takes seconds
    _refuse_existing(Path(output))
    degrees = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "sequence": tensor > 1}
    world_size = pipeline * math.lcm(tensor, expert)
    return Path(run_job(_import, world_size, source, output, megatron, dtype, degrees)[0])


def _import(
    platform: Platform,
    source: str | Path,
    output: str | Path,
    megatron: str | Path | None,
    dtype: str,
    degrees: dict[str, Any],
) -> str:
    """On every rank."""
    _refuse_existing(Path(output))
    weights = _open(source, megatron)
    described = str(weights.directory)
    parallel = platform.parallel(**degrees)
    chunks = build_model(weights.architecture, parallel, platform, ModelSettings(dtype=DTYPES[dtype]))
    load_from(weights, chunks, parallel, described=described)
    writer = CheckpointWriter(
        Path(output),
        architecture=weights.architecture,
        config={"model": {"hf": described}, "precision": {"dtype": dtype}},
        layout=parallel.layout,
        tokenizer_files=tokenizer_files(Path(source)),
    )
    return str(writer.save(TrainState([_SavedOnce(chunk) for chunk in chunks])))


def _open(source: str | Path, megatron: str | Path | None) -> SafetensorsDirectory | MegatronCheckpoint:
    if megatron is None:
        return SafetensorsDirectory(source)
    return MegatronCheckpoint(megatron, Architecture.from_directory(source))


def _refuse_existing(output: Path) -> None:
    if (output / LATEST).exists():
        raise CheckpointError(f"{output} already holds checkpoints. Choose another --output.")


class _SavedOnce:
    """A model that is not needed after it is saved: its state dict takes over the parameters' memory.

    Megatron-Core saves a fused parameter as its parts, and its writer copies parts that are views, all of them before it writes the
    first one: for fused gate and up projections alone that is a third of a model. Here each is copied and freed in turn.
    """

    def __init__(self, model: PolicyModel) -> None:
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
