"""The mapping table of adapters: their parameters in Megatron-Core and their tensors in a Hugging Face PEFT adapter.

Beside a layer's `….weight` [rows, in], whose rows are those of n projections in Megatron's order, stand

    ….adapter.a   [n · r, in]   the projections' A, one below the other; of a row-parallel layer split along `in`, like the weight
    ….adapter.b   [rows, r]     the projections' B, in the rows of the weight, split like them; of a row-parallel layer not split

so that B has the weight's own `ParameterLayout`. Pure tensor functions: no Megatron-Core, no collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iwsft.hf.adapters import LAYERS, AdapterSettings, projections
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import generator_for
from megatron_iwsft.hf.mapping import Mapping, ParameterLayout, PerExpert, Replicated, Span, Split, numbered, table

WEIGHT = ".weight"
A, B = ".adapter.a", ".adapter.b"
_PEFT = "base_model.model."
LORA = {A: ".lora_A.weight", B: ".lora_B.weight"}


@dataclass(frozen=True)
class Stacked:
    """The tensors of several projections, one below the other; the same on every rank."""

    count: int

    def spans(self, shapes: list[tuple[int, ...]], rank: int, size: int) -> list[Span]:
        return [(0, 0, shape[0]) for shape in shapes]

    def join(self, parts: list[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat(parts)

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return shards[0]

    def split(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(self.count))


def adapted_rows(arch: Architecture, settings: AdapterSettings) -> list[Mapping]:
    """The rows of a model's table whose weights have adapters."""
    names = {f"decoder.layers.{{}}.{layer}{WEIGHT}" for target in settings.targets for layer in LAYERS[target]}
    return [row for row in table(arch) if row.megatron in names]


def adapter_table(arch: Architecture, settings: AdapterSettings) -> list[Mapping]:
    """The mapping table of a model's adapters: two rows for each adapted weight."""
    return [part for row in adapted_rows(arch, settings) for part in _of_weight(row)]


def _of_weight(row: Mapping) -> Iterator[Mapping]:
    layer, layout = row.megatron.removesuffix(WEIGHT), row.layout
    of_one = layout.of_one if isinstance(layout, PerExpert) else layout
    count = len(row.hf) // (layout.count if isinstance(layout, PerExpert) else 1)
    is_row_parallel = isinstance(of_one, Split) and of_one.dim == 1
    layouts: dict[str, ParameterLayout] = {
        A: of_one if is_row_parallel else Stacked(count),
        B: Replicated() if is_row_parallel else of_one,
    }
    for part, of_part in layouts.items():
        names = tuple(lora_name(name, part) for name in row.hf)
        yield Mapping(
            layer + part, names, PerExpert(layout.count, of_part) if isinstance(layout, PerExpert) else of_part
        )


def lora_name(weight: str, part: str) -> str:
    """The name of a projection's A or B in a PEFT adapter."""
    return _PEFT + weight.removesuffix(WEIGHT) + LORA[part]


def adapter_rows(arch: Architecture, settings: AdapterSettings) -> list[tuple[str, Mapping]]:
    """Every adapter parameter of a model: (checkpoint name, mapping with the layer number filled in)."""
    return numbered(adapter_table(arch, settings), arch.num_layers)


def adapter_shapes(arch: Architecture, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
    """PEFT tensor name → shape, in an order in which the tensors of one parameter are adjacent."""
    sizes = {name: size for target in settings.targets for name, size in projections(arch, target).items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, row in adapter_rows(arch, settings):
        for tensor in row.hf:
            out, columns = sizes[tensor.split(".")[-3]]
            found[tensor] = (settings.rank, columns) if name.endswith(A) else (out, settings.rank)
    return found


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A projection's weight with its adapter added, in float32."""
    return weight.float() + scale * (b.float() @ a.float())


class RandomAdapters:
    """Adapters at the start of training, by PEFT's names: A uniform within ±1/√in, B zero, as in PEFT.

    They depend only on the seed and the tensor's name, and so not on the parallel layout.
    """

    def __init__(self, architecture: Architecture, settings: AdapterSettings, seed: int) -> None:
        self.architecture, self._seed = architecture, seed
        self._shapes = adapter_shapes(architecture, settings)

    def read(self, name: str, span: Span) -> Tensor:
        shape = self._shapes[name]
        if name.endswith(LORA[B]):
            full = torch.zeros(shape)
        else:
            full = (2 * torch.rand(shape, generator=generator_for(self._seed, name)) - 1) / math.sqrt(shape[1])
        dim, start, stop = span
        return full.narrow(dim, start, stop - start)
