"""Adapters with random values in both matrices, and the plain model's weights with them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_iwsft.hf.adapter_mapping import A, B, RandomAdapters, adapter_shapes, lora_name
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import generator_for
from megatron_iwsft.hf.mapping import Span


class TrainedAdapters(RandomAdapters):
    """As after some training: B is not zero."""

    def read(self, name: str, span: Span) -> Tensor:
        if ".lora_A." in name:
            return super().read(name, span)
        dim, start, stop = span
        return (0.1 * torch.randn(self._shapes[name], generator=generator_for(1, name))).narrow(
            dim, start, stop - start
        )


def in_double(arch: Architecture, settings: AdapterSettings) -> dict[str, Tensor]:
    """The tensors of `TrainedAdapters` in float64, with gradients."""
    source = TrainedAdapters(arch, settings, 5)
    found = adapter_shapes(arch, settings).items()
    return {n: source.read(n, (0, 0, s[0])).double().requires_grad_() for n, s in found}


def effective(weights: dict[str, Tensor], adapters: dict[str, Tensor], settings: AdapterSettings) -> dict[str, Tensor]:
    """W + alpha/rank · B·A, written out once more."""

    def of(name: str) -> Tensor:
        if lora_name(name, A) not in adapters:
            return weights[name]
        delta = torch.einsum("or,ri->oi", adapters[lora_name(name, B)], adapters[lora_name(name, A)])
        return weights[name] + settings.alpha * delta / settings.rank

    return {name: of(name) for name in weights}
