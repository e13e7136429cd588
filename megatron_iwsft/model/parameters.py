"""Where a rank's parameters are stored in checkpoints, and filling them from Hugging Face tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.distributed.mcore_compat import unquantized_copy
from megatron_iwsft.hf.directory import TensorSource
from megatron_iwsft.hf.mapping import Mapping, PerExpert, shapes, table

if TYPE_CHECKING:
    from megatron_iwsft.model.gpt import PolicyModel

# Names of the local backend's parameters → names in checkpoints, which are Transformer Engine's: it fuses a norm with the
# projection that follows, but not the norm before a router.
ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NORMS = {**ATTENTION_NORM, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

# An expert's parameter in the local backend, and in Transformer Engine's grouped layers.
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc.)\.weight|(linear_fc.)\.weight(\d+))$")


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert of a mixture."""
    return _EXPERT.search(name) is not None


def checkpoint_name(model: PolicyModel, name: str) -> tuple[str, int | None]:
    """Under which name a parameter is saved: (name with the global layer number, global expert number or None).

    Names are Transformer Engine's, whatever the backend. Every expert of a layer has the same name.
    """
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        name = f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
    experts = model.architecture.experts
    for ours, theirs in (ATTENTION_NORM if experts else _DENSE_NORMS).items():
        name = name.replace(ours, theirs)
    found = _EXPERT.search(name)
    if found is None or experts is None:
        return name, None
    number, kind = int(found[1] or found[4]), found[2] or found[3]
    group = model.pg_collection.ep
    number += group.rank() * (experts.count // group.size())
    return f"{name[: found.start()]}mlp.experts.experts.{kind}.weight", number


@torch.no_grad()
def load_weights(chunks: list[PolicyModel], source: TensorSource, parallel: ParallelContext) -> None:
    """Fill every parameter of this rank from `source`, reading only this rank's slices."""
    arch = source.architecture
    rank, size = parallel.tp.rank(), parallel.tp.size()
    rows = {row.megatron: row for row in table(arch, tensor_parallel=size)}
    all_shapes = shapes(arch)
    for model in chunks:
        for name, parameter in model.named_parameters():
            target, expert = checkpoint_name(model, name)
            layer = target.split(".")[2] if target.startswith("decoder.layers.") else ""
            pattern = target.replace(f"layers.{layer}.", "layers.{}.") if layer else target
            if pattern == "output_layer.weight" and arch.tied:
                pattern = "embedding.word_embeddings.weight"
            row = rows[pattern]
            if isinstance(row.layout, PerExpert) and expert is not None:
                row = row.layout.one(row, expert)
            named = Mapping(target, tuple(hf.format(layer) for hf in row.hf), row.layout)
            cut = (0, 1) if expert is not None else (rank, size)  # tensor parallelism does not cut experts
            parts = [source.read(hf, span) for hf, span in named.slices(all_shapes, *cut)]
            fill(parameter, row.layout.join(parts, *cut))


@torch.no_grad()
def fill(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, and with FP8 parameters also what the optimizer will take its float32 copy from."""
    parameter.copy_(value)
    unquantized = unquantized_copy(parameter)
    if unquantized is not None:
        unquantized.copy_(value)
