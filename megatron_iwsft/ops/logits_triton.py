"""Triton kernels for `ops.logits`, each one pass over the logits. They also run in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def row_statistics(logits: Tensor, target: Tensor, out: Tensor) -> None:
    """See `ops.logits.row_statistics`. One program per row."""
    if logits.shape[0]:
        _statistics[(logits.shape[0],)](
            logits,
            target,
            out,
            logits.stride(0),
            out.stride(0),
            COLUMNS=logits.shape[1],
            ENTROPY=len(out) == 4,
            BLOCK=_BLOCK,
        )


def logits_gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> None:
    """See `ops.logits.logits_gradient`. One program per row and block of columns."""
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, _BLOCK))
    _gradient[grid](logits, target, lse, grad, logits.stride(0), columns, BLOCK=_BLOCK)


@triton.jit
def _statistics(
    logits, target, out, row_stride, out_stride, COLUMNS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    # Each lane keeps running values; they are combined once, after the last block.
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    surplus = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(start + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, x)
        # The maximum of a lane without values is −inf; avoid −inf − (−inf) = NaN.
        seen = larger > float("-inf")
        rescale = tl.where(seen, tl.exp(maximum - larger), 0.0)
        shifted = tl.where(column < COLUMNS, x - larger, 0.0)
        gain = tl.where(column < COLUMNS, tl.exp(shifted), 0.0)
        if ENTROPY:
            moved = tl.where(maximum > float("-inf"), maximum - larger, 0.0)
            surplus = (surplus + moved * total) * rescale + gain * shifted
        total = total * rescale + gain
        maximum = larger
    top = tl.max(maximum, axis=0)
    scale = tl.where(maximum > float("-inf"), tl.exp(maximum - top), 0.0)
    tl.store(out + row, top)
    tl.store(out + out_stride + row, tl.sum(total * scale, axis=0))
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < COLUMNS)
    picked = tl.load(start + wanted, mask=here, other=0.0).to(tl.float32)
    tl.store(out + 2 * out_stride + row, tl.where(here, picked, 0.0))
    if ENTROPY:
        moved = tl.where(maximum > float("-inf"), maximum - top, 0.0)
        tl.store(out + 3 * out_stride + row, tl.sum((surplus + moved * total) * scale, axis=0))


@triton.jit
def _gradient(logits, target, lse, grad, row_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * row_stride + column
    x = tl.load(at, mask=column < columns, other=0.0).to(tl.float32)
    g = tl.load(grad + row)
    d = -g * tl.exp(x - tl.load(lse + row))
    d = tl.where(column == tl.load(target + row), d + g, d)
    tl.store(at, d.to(logits.dtype.element_ty), mask=column < columns)
