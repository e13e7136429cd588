"""Parts of transformer layers that Megatron-Core's own lack: norms of a block's output, rotary positions by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_iwsft.hf.architecture import Architecture


class NormedResidual(torch.nn.Module):
    """Adds a block's output to the residual after a norm of the output (Gemma 3): in place of Megatron-Core's bias-dropout-add.

    norm: the module that normalises, built with (config, hidden_size, eps). There is no bias and no dropout.
    """

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__()
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The function that Megatron-Core then calls with ((output, no bias), residual, dropout probability)."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        return residual + self.norm(output_with_bias[0])


def normed_residual(config: TransformerConfig, norm: Any) -> ModuleSpec:
    return ModuleSpec(module=NormedResidual, params={"config": config, "norm": norm})


class RotaryLayer(TransformerLayer):
    """A layer with rotary positions of its own: it takes its columns of the angles of all `inverse_frequencies`.

    columns: per layer of the model, the place of its rope among the distinct ones; None for a layer without positions.
    """

    def __init__(self, *args: Any, columns: tuple[int | None, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._column, self._distinct = columns[self.layer_number - 1], 1 + max(c for c in columns if c is not None)

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        return super().forward(*args, rotary_pos_emb=self._own(rotary_pos_emb), **kwargs)

    def _own(self, angles: Tensor) -> Tensor | None:
        """[S, 1, 1, 2 · distinct · d] → [S, 1, 1, 2 · d]: Megatron-Core repeats the angles, once for each half of a head."""
        if self._column is None:
            return None
        own = angles.chunk(2 * self._distinct, dim=-1)[self._column]
        return torch.cat([own, own], dim=-1)


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Of all distinct ropes of a model, one after the other: float32 [distinct · d]."""
    return torch.cat([rope.inverse_frequencies(arch.head_dim) for rope in arch.distinct_ropes])


def rope_columns(arch: Architecture) -> tuple[int | None, ...] | None:
    """`RotaryLayer`'s columns; None if all layers have the same rotary positions."""
    if all(rope == arch.ropes[0] for rope in arch.ropes):
        return None
    return tuple(None if rope is None else arch.distinct_ropes.index(rope) for rope in arch.ropes)
