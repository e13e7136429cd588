"""Triton kernels for `ops.logits`, each one pass over the logits. They also run in Triton's interpreter.

Both are bound by instructions, not by memory, unless a column costs about ten of them. Hence one running maximum per row and not one per
lane, powers of two, no mask except in the last block, and 16-byte loads, for which rows must start at multiples of 16 bytes.
`tools/bench/kernels.py` counts the instructions without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def row_statistics(logits: Tensor, target: Tensor, out: Tensor) -> None:
    """See `ops.logits.row_statistics`. One program per row."""
    if logits.shape[0]:
        statistics_kernel[(logits.shape[0],)](
            logits,
            target,
            out,
            logits.stride(0),
            out.stride(0),
            COLUMNS=logits.shape[1],
            ENTROPY=len(out) == 4,
            BLOCK=BLOCK,
        )


def logits_gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> None:
    """See `ops.logits.logits_gradient`. One program per row and block of columns."""
    rows, columns = logits.shape
    gradient_kernel[(rows, triton.cdiv(columns, BLOCK))](
        logits, target, lse, grad, logits.stride(0), COLUMNS=columns, BLOCK=BLOCK
    )


# Specialised on what a model fixes (columns, row stride, dtype), not on what changes with every batch: the number of trained tokens, and
# where a chunk begins in the tensors that hold one value per token.
@triton.jit(do_not_specialize=["out_stride"], do_not_specialize_on_alignment=["target", "out"])
def statistics_kernel(
    logits, target, out, row_stride, out_stride, COLUMNS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    lane = tl.arange(0, BLOCK)
    maximum = -1e38  # finite: a first block of −inf alone would give −inf − (−inf) = NaN
    top = maximum * _LOG2E
    total = 0.0
    surplus = 0.0
    FULL: tl.constexpr = COLUMNS // BLOCK * BLOCK
    for first in range(0, FULL, BLOCK):
        x = tl.load(start + first + lane).to(tl.float32)
        maximum, top, total, surplus = _add_block(x, maximum, top, total, surplus, ENTROPY)
    if FULL < COLUMNS:
        x = tl.load(start + FULL + lane, mask=FULL + lane < COLUMNS, other=-1e38).to(tl.float32)
        maximum, top, total, surplus = _add_block(x, maximum, top, total, surplus, ENTROPY)
    # top is rounded: the sums are relative to it, and corrected to be relative to the exact maximum.
    rounding = tl.fma(maximum, _LOG2E, -top)
    scale = tl.exp2(-rounding)
    tl.store(out + row, maximum)
    tl.store(out + out_stride + row, total * scale)
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < COLUMNS)
    picked = tl.load(start + wanted, mask=here, other=0.0).to(tl.float32)
    tl.store(out + 2 * out_stride + row, tl.where(here, picked, 0.0))
    if ENTROPY:
        tl.store(out + 3 * out_stride + row, (surplus - rounding * total) * scale * _LN2)


@triton.jit
def _add_block(x, maximum, top, total, surplus, ENTROPY: tl.constexpr):
    """Add a block to a row's maximum, top = maximum · log2(e), total = Σ 2^d and surplus = Σ 2^d · d, where d = x · log2(e) − top."""
    maximum = tl.maximum(maximum, tl.max(x, axis=0))
    # Not a product: the compiler would fuse it into the subtraction, with another rounding than in the exponents below.
    new_top = tl.fma(maximum, _LOG2E, 0.0)
    moved = top - new_top
    rescale = tl.exp2(moved)
    d = tl.fma(x, _LOG2E, -new_top)
    gain = tl.exp2(d)
    if ENTROPY:
        surplus = (surplus + moved * total) * rescale + tl.sum(gain * d, axis=0)
    return maximum, new_top, total * rescale + tl.sum(gain, axis=0), surplus


@triton.jit(do_not_specialize_on_alignment=["target", "lse", "grad"])
def gradient_kernel(logits, target, lse, grad, row_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    lane = tl.arange(0, BLOCK)
    at = logits + row * row_stride + first + lane
    wanted = (tl.load(target + row) - first).to(tl.int32)
    g = tl.load(grad + row)
    normalizer = tl.load(lse + row)
    if first + BLOCK <= COLUMNS:
        d = _row_gradient(tl.load(at).to(tl.float32), normalizer, g)
        if (wanted >= 0) & (wanted < BLOCK):  # in at most one block of the row
            d = tl.where(lane == wanted, d + g, d)
        tl.store(at, d.to(logits.dtype.element_ty))
    else:
        mask = lane < COLUMNS - first
        d = _row_gradient(tl.load(at, mask=mask, other=0.0).to(tl.float32), normalizer, g)
        d = tl.where(lane == wanted, d + g, d)
        tl.store(at, d.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def _row_gradient(x, normalizer, g):
    top = normalizer * _LOG2E
    scale = -g * tl.exp2(-tl.fma(normalizer, _LOG2E, -top))  # corrects the rounding of top, as above
    return scale * tl.exp2(tl.fma(x, _LOG2E, -top))
