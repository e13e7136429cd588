"""Where a rank's parameters are stored in checkpoints, and filling them from Hugging Face tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.distributed.mcore_compat import unquantized_copy
from megatron_iwsft.hf.adapter_mapping import adapter_shapes, adapter_table
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.directory import TensorSource
from megatron_iwsft.hf.mapping import Mapping, PerExpert, shapes, table

if TYPE_CHECKING:
    from megatron_iwsft.model.gpt import PolicyModel

# Names of the local backend's parameters → names in checkpoints, which are Transformer Engine's: it fuses a norm with the
# projection that follows, but not the norm before a router.
ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NORMS = {**ATTENTION_NORM, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

# An expert's parameter in the local backend, and in Transformer Engine's grouped layers.
_EXPERT = re.compile(
    r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<layer>linear_fc.)\.(?P<part>weight|adapter\.[ab])$"
)
_GROUPED = re.compile(
    r"mlp\.experts\.(?P<layer>linear_fc.)\.(?P<part>weight|adapter\.)(?P<number>\d+)(?P<matrix>\.[ab])?$"
)


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one expert of a mixture."""
    return _expert(name) is not None


def _expert(name: str) -> re.Match[str] | None:
    return _EXPERT.search(name) or _GROUPED.search(name)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".adapter." in name


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
    found = _expert(name)
    if found is None or experts is None:
        return name, None
    group = model.pg_collection.ep
    number = int(found["number"]) + group.rank() * (experts.count // group.size())
    part = found["part"].rstrip(".") + (found.groupdict().get("matrix") or "")
    return f"{name[: found.start()]}mlp.experts.experts.{found['layer']}.{part}", number


def load_weights(chunks: list[PolicyModel], source: TensorSource, parallel: ParallelContext) -> None:
    """Fill every parameter of this rank from `source`, reading only this rank's slices. To be called before adapters are added."""
    arch = source.architecture
    rows = {row.megatron: row for row in table(arch, tensor_parallel=parallel.tp.size())}
    if arch.tied:
        rows["output_layer.weight"] = rows["embedding.word_embeddings.weight"]
    _load(chunks, rows, shapes(arch), source, parallel)


def load_adapters(
    chunks: list[PolicyModel], settings: AdapterSettings, source: TensorSource, parallel: ParallelContext
) -> None:
    """Fill every adapter of this rank from `source`, which has PEFT's tensors, reading only this rank's slices."""
    arch = source.architecture
    rows = {row.megatron: row for row in adapter_table(arch, settings)}
    _load(chunks, rows, adapter_shapes(arch, settings), source, parallel)


@torch.no_grad()
def _load(
    chunks: list[PolicyModel],
    rows: dict[str, Mapping],
    all_shapes: dict[str, tuple[int, ...]],
    source: TensorSource,
    parallel: ParallelContext,
) -> None:
    """rows: of a table, by checkpoint name."""
    for model in chunks:
        for name, parameter in model.trained_parameters():
            found = row_of(model, name, rows)
            assert found is not None, name
            row, expert = found
            cut = (0, 1) if expert is not None else (parallel.tp.rank(), parallel.tp.size())
            parts = [source.read(hf, span) for hf, span in row.slices(all_shapes, *cut)]
            fill(parameter, row.layout.join(parts, *cut))


def row_of(model: PolicyModel, name: str, rows: dict[str, Mapping]) -> tuple[Mapping, int | None] | None:
    """The row of a parameter, with its layer number filled in and of its expert alone, and which expert that is; None if it has no row.

    rows: of a table, by checkpoint name.
    """
    target, expert = checkpoint_name(model, name)
    layer = target.split(".")[2] if target.startswith("decoder.layers.") else ""
    row = rows.get(target.replace(f"layers.{layer}.", "layers.{}.") if layer else target)
    if row is None:
        return None
    if isinstance(row.layout, PerExpert) and expert is not None:
        row = row.layout.one(row, expert)
    return Mapping(target, tuple(hf.format(layer) for hf in row.hf), row.layout), expert


@torch.no_grad()
def fill(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, and with FP8 parameters also what the optimizer will take its float32 copy from."""
    value = value.to(parameter.dtype)  # as the optimizer does before it rounds to FP8
    parameter.copy_(value)
    unquantized = unquantized_copy(parameter)
    if unquantized is not None:
        unquantized.copy_(value)
