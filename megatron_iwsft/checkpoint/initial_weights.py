"""Where a model's weights come from: a Hugging Face directory, a checkpoint, or a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.load import load
from megatron_iwsft.checkpoint.names import TOKENIZER
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.tensors import hugging_face_reader
from megatron_iwsft.config.schema import Model
from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit, ReadingProgress, SafetensorsDirectory, TensorSource, tokenizer_files
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.model.gpt import PolicyModel
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.utils.files import sampled_fingerprint

_TENSORS = ".distcp"  # suffix of the files that hold them


class InitialWeights:
    """The weights that a config's `model` section names, not yet read.

    architecture     the model they are for
    described        for people
    tokenizer_files  that come with them

    once_per_node: as in `CheckpointInfo.read`
    """

    architecture: Architecture

    def __init__(self, model: Model, seed: int, *, once_per_node: bool = False) -> None:
        self._source: SafetensorsDirectory | RandomInit | None = None
        self._model, self._seed = model, seed
        self.tokenizer_files: list[Path] = []
        if model.hf is not None:
            self._source = SafetensorsDirectory(model.hf)
            self.architecture = self._source.architecture
            self.described = model.hf
            self.tokenizer_files = tokenizer_files(Path(model.hf))
        elif model.checkpoint is not None:
            self._info = CheckpointInfo.read(model.checkpoint, once_per_node=once_per_node)
            if self._info.adapter is not None:
                raise CheckpointError(
                    f"{self._info.directory} holds adapters, not a model's weights. Merge them (iwsft export --merge) and use the result "
                    "as model.hf; or to train them further, use their base and adapter.init: the directory that iwsft export writes."
                )
            self.architecture = self._info.architecture
            self.described = str(self._info.directory)
            self.tokenizer_files = sorted((self._info.directory / TOKENIZER).glob("*"))
        else:
            assert model.config is not None
            self.architecture = Architecture.from_hf(model.config, where="model.config", by_hand=True)
            self._source = RandomInit(self.architecture, seed)
            self.described = f"random initialisation with seed {seed}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the weights or the architecture.

        Of a Hugging Face directory this reads some MB of every file: on one rank for all (`reference_identities`).
        """
        if self._model.hf is not None:
            return self._identity(sampled_fingerprint(Path(self._model.hf), "*.safetensors"))
        if self._model.checkpoint is not None:
            sums = {name: file["sha256"] for name, file in self._info.files.items() if name.endswith(_TENSORS)}
            return self._identity(json.dumps(sums, sort_keys=True))
        return self._identity(f"seed {self._seed}")

    @cached_property
    def earlier_fingerprint(self) -> str | None:
        """What version 0.1.0 called a checkpoint's weights, from samples of its files; None for other weights. Sidecars carry it."""
        if self._model.checkpoint is None:
            return None
        return self._identity(sampled_fingerprint(self._info.directory, f"*{_TENSORS}"))

    def _identity(self, contents: str) -> str:
        identity = json.dumps([self.architecture.hf, contents], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def reader(self) -> tuple[Callable[[str], Tensor], list[str]]:
        """A function from Hugging Face tensor name to the full tensor, and the names in the order that reads each parameter once."""
        source = self._source
        if source is None:
            return hugging_face_reader(self._info.directory, self.architecture)
        all_shapes = shapes(self.architecture)
        return lambda name: source.read(name, (0, 0, all_shapes[name][0])), list(all_shapes)

    def load(self, chunks: list[PolicyModel], parallel: ParallelContext) -> None:
        """Fill this rank's chunks. Collective over all ranks for a checkpoint. Raises DataError for weights that are not finite."""
        if self._source is not None:
            load_from(self._source, chunks, parallel, described=self.described)
        else:
            load(self._info, TrainState(chunks))
            _check_finite(chunks, self.described)


def load_from(source: TensorSource, chunks: list[PolicyModel], parallel: ParallelContext, *, described: str) -> None:
    """Fill this rank's chunks, with a progress bar on the first rank. Raises DataError for weights that are not finite."""
    total = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    with closing(ReadingProgress(source, total, shown=dist.get_rank() == 0)) as progress:
        load_weights(chunks, progress, parallel)
    _check_finite(chunks, described)


def _check_finite(chunks: list[PolicyModel], described: str) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not is_float8tensor(parameter) and not bool(torch.isfinite(parameter).all()):
                raise DataError(f"{described}: {name} contains values that are not finite. Use other weights.")
