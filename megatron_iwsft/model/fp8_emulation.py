"""FP8 matmuls of the local backend, emulated: operands are rounded to FP8 and back, and multiplied in float32.

It shows what a recipe's rounding does to log-probs, weights and losses on any device. It is not a measurement of Transformer Engine:
tensor cores accumulate FP8 products in fewer bits than float32, and its kernels fuse and order the sums differently. It saves no time.

Of y = x·Wᵀ each of the three products has both of its operands rounded, as in Transformer Engine: x and W for y, the gradient of y and W
for the gradient of x, the gradient of y and x for that of W. One scale serves a block of elements, which runs along the dimension that the
product sums over:

  recipe      block of activations and gradients   block of weights   scales          forward, backward
  delayed     the tensor                           the tensor         from before     E4M3, E5M2
  tensorwise  the tensor                           the tensor         any             E4M3, E5M2
  blockwise   1 × 128                              128 × 128          powers of two   E4M3, E4M3
  mxfp8       1 × 32                               1 × 32             powers of two   E4M3, E4M3

Sources: Transformer Engine 2.20, common/recipe (defaults); for mxfp8 the OCP Microscaling specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_BLOCKS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {  # of activations and gradients, of weights
    "blockwise": ((1, 128), (128, 128)),
    "mxfp8": ((1, 32), (1, 32)),
}
HISTORY = 16  # passes whose absolute maxima delayed scaling takes its scale from, if no number is given


def round_to_fp8(
    x: Tensor, dtype: torch.dtype, *, block: tuple[int, int] | None = None, maximum: Tensor | None = None
) -> Tensor:
    """x [rows, columns] rounded to FP8 and back, float32.

    block    rows and columns that share a scale, a power of two; None: one scale, of any value, for all
    maximum  with block None: the largest |x| that the scale is made for (larger values saturate); None: that of x
    """
    x = x.float()
    largest = torch.finfo(dtype).max
    if block is None:
        top = x.abs().amax() if maximum is None else maximum
        scale = torch.where((top > 0) & top.isfinite(), top / largest, 1.0)
        return (x / scale).clamp(-largest, largest).to(dtype).float() * scale
    rows, columns = x.shape
    down, across = block
    padded = torch.nn.functional.pad(x, (0, -columns % across, 0, -rows % down))
    blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
    top = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # The smallest power of two by which no element of the block exceeds the format.
    mantissa, exponent = torch.frexp(top / largest)
    scale = torch.where(top > 0, torch.ldexp(torch.ones_like(top), exponent - (mantissa == 0.5).int()), 1.0)
    return ((blocks / scale).clamp(-largest, largest).to(dtype).float() * scale).view_as(padded)[:rows, :columns]


class Fp8Rounding:
    """How one linear layer rounds its operands. Holds delayed scaling's history, which is not saved in checkpoints."""

    def __init__(self, recipe: FP8Recipe, *, history: int | None = None, algorithm: str | None = None) -> None:
        """history, algorithm: of delayed scaling, as `precision.fp8_amax_history_len` and `fp8_amax_compute_algo`."""
        self.recipe, self._length, self._newest = recipe, history or HISTORY, algorithm == "most_recent"
        self._backward = E5M2 if FP8_RECIPES[recipe].format == "hybrid" else E4M3
        self._seen: dict[str, list[Tensor]] = {}

    def input(self, x: Tensor) -> Tensor:
        return self._round("input", x, E4M3, 0)

    def weight(self, weight: Tensor) -> Tensor:
        return self._round("weight", weight, E4M3, 1)

    def gradient(self, grad: Tensor) -> Tensor:
        return self._round("gradient", grad, self._backward, 0)

    @property
    def is_blockwise(self) -> bool:
        """Whether an operand rounds differently in the products that sum over its other dimension."""
        return self.recipe in _BLOCKS

    def _round(self, operand: str, x: Tensor, dtype: torch.dtype, which: int) -> Tensor:
        if self.is_blockwise:
            return round_to_fp8(x, dtype, block=_BLOCKS[self.recipe][which])
        if self.recipe == "tensorwise":
            return round_to_fp8(x, dtype)
        history = self._seen.setdefault(operand, [])
        # Before the first pass there is no history: Transformer Engine starts at scale 1.
        maximum = x.new_tensor(torch.finfo(dtype).max, dtype=torch.float32)
        if history:
            maximum = history[-1] if self._newest else torch.stack(history).amax()
        history.append(x.detach().abs().amax().float())
        del history[: -self._length]
        return round_to_fp8(x, dtype, maximum=maximum)


class _Linear(torch.autograd.Function):
    """x [T, K] · weight [N, K]ᵀ → [T, N] in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Fp8Rounding) -> Tensor:
        rounded_x, rounded_weight = rounding.input(x), rounding.weight(weight)
        # Where scales are per block, the other products round the operands anew.
        ctx.save_for_backward(*((x, weight) if rounding.is_blockwise else (rounded_x, rounded_weight)))
        ctx.rounding, ctx.dtypes = rounding, (x.dtype, weight.dtype)
        return (rounded_x @ rounded_weight.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rounding: Fp8Rounding = ctx.rounding
        by_row, grad_weight = rounding.gradient(grad), None
        grad_x = by_row @ (rounding.weight(weight.t()).t() if rounding.is_blockwise else weight)
        if ctx.needs_input_grad[1]:  # not of a frozen weight
            by_column, by_input = by_row.t(), x
            if rounding.is_blockwise:
                by_column, by_input = rounding.gradient(grad.t()), rounding.input(x.t()).t()
            grad_weight = (by_column @ by_input).to(ctx.dtypes[1])
        return grad_x.to(ctx.dtypes[0]), grad_weight, None


def _product(x: Tensor, weight: Tensor, rounding: Fp8Rounding) -> Tensor:
    return _Linear.apply(x.flatten(0, -2), weight, rounding).unflatten(0, x.shape[:-1])


class EmulatedColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's layer with its matmul in emulated FP8 where `rounding` is set. The scales are this rank's own."""

    rounding: Fp8Rounding | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.rounding is None:
            return super().forward(input_, *args, **kwargs)
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            input_ = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        out = _product(input_, self.weight, self.rounding)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None


class EmulatedRowParallelLinear(RowParallelLinear):
    """See `EmulatedColumnParallelLinear`."""

    rounding: Fp8Rounding | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.rounding is None:
            return super().forward(input_)
        out = _product(input_, self.weight, self.rounding)
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        else:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None


def emulate_fp8(
    model: torch.nn.Module,
    rounding: Callable[[], Fp8Rounding],
    *,
    layers: int,
    bf16_first_layers: int,
    bf16_last_layers: int,
) -> None:
    """Set the rounding of every layer's matmuls in a model of `layers` layers, except those at its edges that stay in bf16."""
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        if bf16_first_layers < layer.layer_number <= layers - bf16_last_layers:
            for module in layer.modules():
                if isinstance(module, (EmulatedColumnParallelLinear, EmulatedRowParallelLinear)):
                    module.rounding = rounding()
