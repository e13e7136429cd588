"""The weights in a checkpoint that Megatron-LM or Megatron-Bridge has written (torch_dist), by Hugging Face tensor name.

Its tensors have the names of the mapping table (hf/mapping.py), except that all layers' tensors of a kind are stacked into one, unless
layers differ in kind, and except for `_OTHER_NAMES`. Optimizer states, random states and Transformer Engine's `_extra_state`s are not read.

It does not say which model it is: a config.json does, whose shapes are compared, and other values with what the program has saved beside
the weights: Megatron-LM its arguments, Megatron-Bridge its run_config.yaml.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.pickles import METADATA, read_arguments, read_metadata
from megatron_iwsft.checkpoint.tensors import StoredTensors
from megatron_iwsft.config.loader import read_yaml
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import Mapping, Span, Vocabulary, named_rows, shapes
from megatron_iwsft.utils.files import read_regular

# Programs differ in what they put before every name.
_PREFIXES = ("", "model.", "module.")
_FIRST = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"layers\.(\d+)\.")
# Our names → other ones: of Megatron-Bridge's own layers, and of Megatron-LM's local layers with experts.
_OTHER_NAMES = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# The iteration that a run saved last, as both programs note it in the directory of all of them.
_LATEST = "latest_checkpointed_iteration.txt"
_BRIDGE_CONFIG = "run_config.yaml"
# By which Megatron-LM (0.16 to 0.19) scales rotary positions, whatever --rope-scaling-factor says: it does not reach the model.
_SCALING_FACTOR = 8.0
_NO_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|.*_extra_state")


class MegatronCheckpoint:
    """A `TensorSource`. Holds one parameter of the whole model, or of one layer, in memory at a time.

    The constructor checks that every tensor of the architecture is there, with the shape that it implies, and no others. Raises
    CheckpointError.
    """

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        self.directory, self.architecture = _iteration(Path(directory)), architecture
        if not (self.directory / METADATA).is_file():
            raise CheckpointError(
                f"{self.directory} is not a torch_dist checkpoint: it has no {METADATA}. Name a run's checkpoint directory, or that of one "
                "iteration, such as iter_0001000; other formats (torch, zarr, fsdp_dtensor) must be converted with the program that wrote "
                "them."
            )
        names = integrity.names_below(self.directory)
        integrity.check_entries(self.directory, names, names)
        metadata = read_metadata(self.directory)
        self._tensors = StoredTensors(self.directory, metadata, names)
        self._check_settings(metadata, names)
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
        names = [name, *(name.replace(ours, other) for ours, other in _OTHER_NAMES.items() if ours in name)]
        layer = _LAYER.search(name)
        places: list[tuple[str, int | None]] = [(prefix + theirs, None) for theirs in names]
        if layer:
            stacked = [(prefix + _LAYER.sub("layers.", theirs), int(layer[1])) for theirs in names]
            places = [*stacked, *places]
        tensor, index = next((place for place in places if place[0] in stored), (None, None))
        if tensor is None:
            raise CheckpointError(f"{self.directory} has no tensor {places[0][0]}. {_ADVICE}")
        expected, found = self._shape(row), stored[tensor]
        if index is not None:
            if found[:1] != (self.architecture.num_layers,):
                layers = found[0] if found else "no"
                raise CheckpointError(
                    f"{self.directory}: {tensor} has {layers} layers, but config.json has {self.architecture.num_layers}. {_ADVICE}"
                )
            found = found[1:]
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

    def _check_settings(self, metadata: Metadata, names: list[str]) -> None:
        """Raise CheckpointError if what the program saved beside the weights contradicts the architecture where no shape would."""
        arguments = read_arguments(self.directory, metadata, names)
        if arguments.get("use_rope_scaling"):
            arguments["rope_scaling_factor"] = _SCALING_FACTOR
        fields = _bridge_model(self.directory) if _BRIDGE_CONFIG in names else {}
        for argument, field, expected in _settings(self.architecture):
            for given, what in (
                (arguments.get(argument), f"was trained with --{argument.replace('_', '-')}"),
                (fields.get(field), f"has in {_BRIDGE_CONFIG} model.{field}"),
            ):
                if given is not None and given != expected:
                    raise CheckpointError(
                        f"{self.directory} {what} {given}, but config.json implies {expected}. {_ADVICE}"
                    )


_ADVICE = "Use the config.json of this model."


def _iteration(directory: Path) -> Path:
    """The directory itself, or the last iteration in it if it has several, as a run's directory does."""
    try:
        latest = read_regular(directory / _LATEST).decode().strip()
        return directory / (latest if latest == "release" else f"iter_{int(latest):07d}")
    except (OSError, ValueError):
        return directory


def _bridge_model(directory: Path) -> dict[str, Any]:
    """The model's fields in Megatron-Bridge's run_config.yaml; empty if it cannot be read."""
    try:
        return dict(read_yaml(read_regular(directory / _BRIDGE_CONFIG).decode(), _BRIDGE_CONFIG)["model"])
    except (OSError, ConfigError, ValueError, TypeError, KeyError):
        return {}


def _settings(arch: Architecture) -> list[tuple[str, str, Any]]:
    """(Megatron-LM's argument, Megatron-Bridge's field, value), as far as they are the same for all layers and change no shape."""
    both: dict[str, Any] = {
        "num_attention_heads": arch.num_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "rotary_interleaved": False,
    }
    if arch.num_groups < arch.num_heads:  # otherwise it is not used
        both["num_query_groups"] = arch.num_groups
    if arch.experts is not None:
        both |= {
            "moe_router_topk": arch.experts.per_token,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not arch.experts.normalize,
        }
    named: list[tuple[str, str, Any]] = [
        ("norm_epsilon", "layernorm_epsilon", arch.norm_eps),
        ("apply_layernorm_1p", "layernorm_zero_centered_gamma", arch.zero_centered_norms),
    ]
    ropes = {json.dumps(rope.to_hf()): rope for rope in arch.ropes if rope is not None}
    if len(ropes) == 1:
        (rope,) = ropes.values()
        both |= {
            "position_embedding_type": "yarn" if rope.kind == "yarn" else "rope",
            "rotary_base": rope.theta,
            "rotary_percent": rope.fraction,
        }
        if rope.kind == "llama3":
            both["rope_scaling_factor"] = rope.parameters["factor"]
        named += [
            ("use_rope_scaling", "rope_scaling", rope.kind == "llama3"),
            (
                "rotary_seq_len_interpolation_factor",
                "seq_len_interpolation_factor",
                rope.parameters["factor"] if rope.kind == "linear" else None,
            ),
        ]
    return [(name, name, value) for name, value in both.items()] + named
