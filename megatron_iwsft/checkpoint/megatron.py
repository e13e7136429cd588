"""The weights in a checkpoint that Megatron-LM or Megatron-Bridge has written (torch_dist), by Hugging Face tensor name.

Its tensors have the names of the mapping table (hf/mapping.py), except that all layers' tensors of a kind are stacked into one, unless
layers differ in kind, and except for `_OTHER_NAMES`. Optimizer states, random states and Transformer Engine's `_extra_state`s are not read.

It does not say which model it is: a config.json does, whose shapes, and as far as Megatron-LM has saved its arguments also their other
values, are compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.pickles import METADATA, read_arguments, read_metadata
from megatron_iwsft.checkpoint.tensors import StoredTensors
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import Mapping, Span, Vocabulary, named_rows, shapes

# Programs differ in what they put before every name.
_PREFIXES = ("", "model.", "module.")
_FIRST = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")
# Our names → those of Megatron-Bridge's own layers.
_OTHER_NAMES = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
}
_NO_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|.*_extra_state")


class MegatronCheckpoint:
    """A `TensorSource`. Holds one parameter of the whole model, or of one layer, in memory at a time.

    The constructor checks that every tensor of the architecture is there, with the shape that it implies, and no others. Raises
    CheckpointError.
    """

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        self.directory, self.architecture = Path(directory), architecture
        if not (self.directory / METADATA).is_file():
            raise CheckpointError(
                f"{directory} is not a torch_dist checkpoint: it has no {METADATA}. Name the directory of one iteration, such as "
                "iter_0001000; other formats (torch, zarr, fsdp_dtensor) must be converted with the program that wrote them."
            )
        names = integrity.names_below(self.directory)
        integrity.check_entries(self.directory, names, names)
        metadata = read_metadata(self.directory)
        self._tensors = StoredTensors(self.directory, metadata, names)
        self._check_arguments(read_arguments(self.directory, metadata, names))
        self._rows = named_rows(architecture)
        self._owner = {hf: (name, row) for name, row in self._rows for hf in row.hf}
        self._place = self._find()
        self._cached: tuple[str, list[Tensor]] | None = None

    def read(self, name: str, span: Span) -> Tensor:
        """Return the slice [start, stop) of Hugging Face tensor `name` along one dimension, on CPU."""
        parameter, row = self._owner[name]
        if self._cached is None or self._cached[0] != parameter:
            self._cached = None
            self._cached = parameter, row.layout.split(self._tensors.read(*self._place[parameter]))
        dim, start, stop = span
        return self._cached[1][row.hf.index(name)].narrow(dim, start, stop - start)

    def _find(self) -> dict[str, tuple[str, int | None]]:
        """Parameter → the tensor that it is, or of which it is one index."""
        stored = self._tensors.shapes()
        prefix = next((prefix for prefix in _PREFIXES if prefix + _FIRST in stored), None)
        if prefix is None:
            held = ", ".join(sorted(stored)[:3]) or "no tensors"
            raise CheckpointError(f"{self.directory} has no tensor {_FIRST}, but {held}. {_ADVICE}")
        place = {name: self._place_of(prefix, name, row, stored) for name, row in self._rows}
        used = {tensor for tensor, _ in place.values()}
        extra = [name for name in stored if name.startswith(prefix) and not _NO_WEIGHTS.match(name)]
        for name in sorted(set(extra) - used):
            raise CheckpointError(
                f"{self.directory}: unexpected tensor {name}, which a {self.architecture.family} model does not have. {_ADVICE}"
            )
        return place

    def _place_of(
        self, prefix: str, name: str, row: Mapping, stored: dict[str, tuple[int, ...]]
    ) -> tuple[str, int | None]:
        theirs = name
        for ours, other in _OTHER_NAMES.items():
            theirs = theirs.replace(ours, other)
        layer = _LAYER.search(theirs)
        stacked = prefix + _LAYER.sub("layers.", theirs)
        expected = self._shape(row)
        if prefix + theirs in stored:
            tensor, index, found = prefix + theirs, None, stored[prefix + theirs]
        elif layer and stacked in stored:
            tensor, index, found = stacked, int(layer[1]), stored[stacked][1:]
            if stored[stacked][:1] != (self.architecture.num_layers,):
                layers = stored[stacked][0] if stored[stacked] else "no"
                raise CheckpointError(
                    f"{self.directory}: {tensor} has {layers} layers, but config.json has {self.architecture.num_layers}. "
                    f"{_ADVICE}"
                )
        else:
            raise CheckpointError(f"{self.directory} has no tensor {stacked}. {_ADVICE}")
        padded = isinstance(row.layout, Vocabulary) and found[1:] == expected[1:] and found[0] >= row.layout.size
        if found != expected and not padded:
            raise CheckpointError(
                f"{self.directory}: {tensor} has shape {found}, but config.json implies {expected}. {_ADVICE}"
            )
        return tensor, index

    def _shape(self, row: Mapping) -> tuple[int, ...]:
        """Of a whole parameter."""
        of_all = shapes(self.architecture)
        parts = [
            torch.empty(of_all[hf], device="meta").narrow(dim, start, stop - start)
            for hf, (dim, start, stop) in row.slices(of_all, 0, 1)
        ]
        return tuple(row.layout.join(parts, 0, 1).shape)

    def _check_arguments(self, given: dict[str, Any]) -> None:
        """Raise CheckpointError if Megatron-LM's arguments contradict the architecture where no shape would."""
        for name, expected in _arguments(self.architecture).items():
            found = given.get(name)
            if found is not None and found != expected:
                raise CheckpointError(
                    f"{self.directory} was trained with --{name.replace('_', '-')} {found}, but config.json implies {expected}. {_ADVICE}"
                )


_ADVICE = "Use the config.json of this model."


def _arguments(arch: Architecture) -> dict[str, Any]:
    """Megatron-LM's arguments, as far as they are the same for all layers and change no shape."""
    values: dict[str, Any] = {
        "num_attention_heads": arch.num_heads,
        "kv_channels": arch.head_dim,
        "norm_epsilon": arch.norm_eps,
        "normalization": "RMSNorm",
    }
    if arch.num_groups < arch.num_heads:  # otherwise it is not used
        values["num_query_groups"] = arch.num_groups
    thetas = {rope.theta for rope in arch.ropes if rope is not None}
    if len(thetas) == 1:
        values["rotary_base"] = thetas.pop()
    return values
