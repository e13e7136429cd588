"""Weight mapping between Megatron-Core parameters and Hugging Face tensors: one table for import and export.

Megatron's fused layouts, for one tensor-parallel rank or the full parameter (a rank's rows are contiguous in each source):

    linear_qkv   for each KV group g:  [ query heads of g · head_dim | key of g | value of g ]   rows
    linear_fc1                         [ gate | up ]                                             rows
    embedding, output layer            vocabulary rows, zeros from vocab_size to the padded size
    experts                            every expert's linear_fc1 (linear_fc2), stacked; never split by tensor parallelism

Pure tensor functions: no Megatron-Core, no collectives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_iwsft.hf.architecture import Architecture

Span = tuple[int, int, int]  # (dimension, start, stop)


class ParameterLayout(Protocol):
    """How the Hugging Face tensors of one parameter are sharded over `size` tensor-parallel ranks and joined."""

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        """The slices that `rank` needs: one of each Hugging Face tensor, or several of a single one."""
        ...

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        """Build one rank's Megatron parameter from the slices of `spans` (the full parameter if size is 1)."""
        ...

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """Build the full Megatron parameter from the shards of all ranks, in rank order."""
        ...

    def split(self, full: Tensor) -> list[Tensor]:
        """Split the full Megatron parameter into its Hugging Face tensors."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same on every rank."""

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        return [(0, 0, shapes[0][0])]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        return parts[0]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0]

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class Split:
    """Split evenly along `dim`: 0 for column-parallel layers, 1 for row-parallel ones."""

    dim: int

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        step = shapes[0][self.dim] // size
        return [(self.dim, rank * step, (rank + 1) * step)]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        return parts[0]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=self.dim)

    def split(self, full: Tensor) -> list[Tensor]:
        return [full]


@dataclass(frozen=True)
class GateUp:
    """[gate | up], each split along its rows."""

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        step = shapes[0][0] // size
        return [(0, rank * step, (rank + 1) * step)] * 2

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat(parts)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat([shard.chunk(2)[half] for half in (0, 1) for shard in shards])

    def split(self, full: Tensor) -> list[Tensor]:
        gate, up = full.chunk(2)
        return [gate, up]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by KV group; for weights [rows, H] and biases [rows].

    If there are fewer groups than ranks, a group's rows are split evenly over the ranks that share it, as in Megatron-Core.
    """

    heads: int
    groups: int
    head_dim: int

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        start, stop = self._group_range(rank, size)
        per_group = (self.heads // self.groups) * self.head_dim
        query = (0, start * per_group, stop * per_group)
        key = value = (0, start * self.head_dim, stop * self.head_dim)
        return [query, key, value]

    def _group_range(self, rank: int, size: int) -> tuple[int, int]:
        if size <= self.groups:
            step = self.groups // size
            return rank * step, (rank + 1) * step
        group = rank * self.groups // size
        return group, group + 1

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        rest = parts[0].shape[1:]
        groups = parts[1].shape[0] // self.head_dim
        fused = torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)
        sharers = max(1, size // self.groups)
        return fused.chunk(sharers)[rank % sharers]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards)

    def split(self, full: Tensor) -> list[Tensor]:
        rest = full.shape[1:]
        query_rows = (self.heads // self.groups) * self.head_dim
        parts = full.reshape(self.groups, -1, *rest).split([query_rows, self.head_dim, self.head_dim], dim=1)
        return [p.reshape(-1, *rest) for p in parts]


@dataclass(frozen=True)
class Fused:
    """One Hugging Face tensor: the tensors of `parts`, with these numbers of rows, stacked."""

    parts: ParameterLayout
    rows: tuple[int, ...]

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        inner = self.parts.spans([(rows, *shapes[0][1:]) for rows in self.rows], rank, size)
        first = itertools.accumulate(self.rows, initial=0)
        return [(dim, at + start, at + stop) for at, (dim, start, stop) in zip(first, inner, strict=False)]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        return self.parts.join(parts, rank, size)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return self.parts.unshard(shards)

    def split(self, full: Tensor) -> list[Tensor]:
        return [torch.cat(self.parts.split(full))]


@dataclass(frozen=True)
class Vocabulary:
    """Rows split evenly over the ranks after zero-padding to `padded`."""

    size: int
    padded: int

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        step = self.padded // size
        return [(0, min(rank * step, self.size), min((rank + 1) * step, self.size))]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        rows = self.padded // size
        if parts[0].shape[0] == rows:  # avoid a copy: this is the model's largest tensor
            return parts[0]
        out = parts[0].new_zeros(rows, *parts[0].shape[1:])
        out[: parts[0].shape[0]] = parts[0]
        return out

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards)

    def split(self, full: Tensor) -> list[Tensor]:
        return [full[: self.size]]


@dataclass(frozen=True)
class PerExpert:
    """The parameter of all experts, stacked along a new first dimension. A rank holds complete experts, as separate parameters."""

    count: int
    of_one: ParameterLayout

    def one(self, row: Mapping, expert: int) -> Mapping:
        """The mapping of one expert's parameter."""
        size = len(row.hf) // self.count
        return Mapping(row.megatron, row.hf[expert * size : (expert + 1) * size], self.of_one)

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        return [(0, 0, shape[0]) for shape in shapes]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        step = len(parts) // self.count
        return torch.stack([self.of_one.join(parts[i : i + step], 0, 1) for i in range(0, len(parts), step)])

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0]

    def split(self, full: Tensor) -> list[Tensor]:
        return [part for expert in full for part in self.of_one.split(expert)]


@dataclass(frozen=True)
class Mapping:
    """One row of the table. `{}` in a name stands for the layer number.

    megatron  name of the parameter in a checkpoint (and in the Transformer Engine model)
    hf        names of the Hugging Face tensors that it consists of
    """

    megatron: str
    hf: tuple[str, ...]
    layout: ParameterLayout

    def slices(self, shapes: dict[str, tuple[int, ...]], rank: int, size: int) -> list[tuple[str, Span]]:
        """What a rank reads: (Hugging Face tensor, slice), in the order in which `layout` joins them. shapes: of all tensors."""
        spans = self.layout.spans([shapes[name] for name in self.hf], rank, size)
        return list(zip(itertools.cycle(self.hf), spans, strict=False))


def table(arch: Architecture, *, tensor_parallel: int = 1) -> list[Mapping]:
    """The mapping table of a model. A tied output layer has no row, because it is the embedding."""
    vocabulary = Vocabulary(arch.vocab_size, arch.padded_vocab(tensor_parallel))
    qkv = QKV(arch.num_heads, arch.num_groups, arch.head_dim)
    layer, hf_layer = "decoder.layers.{}.", "model.layers.{}."

    def in_layer(megatron: str, *hf: str, layout: ParameterLayout) -> Mapping:
        return Mapping(layer + megatron, tuple(hf_layer + name for name in hf), layout)

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")

    if arch.fused_projections:
        query, kv = arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim
        weights = in_layer(
            "self_attention.linear_qkv.weight", "self_attn.qkv_proj.weight", layout=Fused(qkv, (query, kv, kv))
        )
    else:
        weights = in_layer("self_attention.linear_qkv.weight", *projections("weight"), layout=qkv)
    rows = [
        Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        in_layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", layout=Replicated()),
        weights,
        in_layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", layout=Split(1)),
        *_feed_forward(arch, in_layer),
        Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    ]
    if arch.qk_norm:
        rows += [
            in_layer(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", layout=Replicated())
            for x in "qk"
        ]
    if arch.post_norms:
        rows += [
            in_layer("self_attn_bda.norm.weight", "post_attention_layernorm.weight", layout=Replicated()),
            in_layer("mlp_bda.norm.weight", "post_feedforward_layernorm.weight", layout=Replicated()),
        ]
    if arch.qkv_bias:
        rows.append(in_layer("self_attention.linear_qkv.bias", *projections("bias"), layout=qkv))
    if not arch.tied:
        rows.append(Mapping("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rows


def _feed_forward(arch: Architecture, in_layer: Callable[..., Mapping]) -> list[Mapping]:
    norm = "pre_feedforward_layernorm.weight" if arch.post_norms else "post_attention_layernorm.weight"
    if arch.experts is None:
        fused = Fused(GateUp(), (arch.ffn_size, arch.ffn_size))
        return [
            in_layer("mlp.linear_fc1.layer_norm_weight", norm, layout=Replicated()),
            in_layer("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", layout=fused)
            if arch.fused_projections
            else in_layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", layout=GateUp()),
            in_layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", layout=Split(1)),
        ]
    count = arch.experts.count

    def per_expert(*names: str) -> list[str]:
        return [f"mlp.experts.{e}.{name}_proj.weight" for e in range(count) for name in names]

    stacked = "mlp.experts.experts."
    return [
        in_layer("pre_mlp_layernorm.weight", norm, layout=Replicated()),
        in_layer("mlp.router.weight", "mlp.gate.weight", layout=Replicated()),
        in_layer(stacked + "linear_fc1.weight", *per_expert("gate", "up"), layout=PerExpert(count, GateUp())),
        in_layer(stacked + "linear_fc2.weight", *per_expert("down"), layout=PerExpert(count, Split(1))),
    ]


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name → shape, for every tensor of the model, in a fixed order."""
    query, kv = arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim
    ffn = arch.experts.ffn_size if arch.experts else arch.ffn_size
    by_suffix = {
        "embed_tokens.weight": (arch.vocab_size, arch.hidden_size),
        "lm_head.weight": (arch.vocab_size, arch.hidden_size),
        "qkv_proj.weight": (query + 2 * kv, arch.hidden_size),  # before their suffixes
        "gate_up_proj.weight": (2 * ffn, arch.hidden_size),
        "q_proj.weight": (query, arch.hidden_size),
        "k_proj.weight": (kv, arch.hidden_size),
        "v_proj.weight": (kv, arch.hidden_size),
        "q_proj.bias": (query,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "o_proj.weight": (arch.hidden_size, query),
        "q_norm.weight": (arch.head_dim,),
        "k_norm.weight": (arch.head_dim,),
        "gate_proj.weight": (ffn, arch.hidden_size),
        "up_proj.weight": (ffn, arch.hidden_size),
        "down_proj.weight": (arch.hidden_size, ffn),
        "mlp.gate.weight": (arch.experts.count if arch.experts else 0, arch.hidden_size),
        "norm.weight": (arch.hidden_size,),  # last, because it is a suffix of the layernorms' names too
    }
    out = {}
    for _, name in named_rows(arch):
        for hf in name.hf:
            out[hf] = next(shape for suffix, shape in by_suffix.items() if hf.endswith(suffix))
    return out


def named_rows(arch: Architecture, *, tensor_parallel: int = 1) -> list[tuple[str, Mapping]]:
    """Every parameter of a model: (checkpoint name, mapping with the layer number filled in)."""
    return numbered(table(arch, tensor_parallel=tensor_parallel), arch.num_layers)


def numbered(rows: list[Mapping], layers: int) -> list[tuple[str, Mapping]]:
    """The rows of a table with the layer numbers filled in, by checkpoint name."""
    out = []
    for row in rows:
        for layer in range(layers) if "{}" in row.megatron else (0,):
            named = Mapping(row.megatron.format(layer), tuple(name.format(layer) for name in row.hf), row.layout)
            out.append((named.megatron, named))
    return out
