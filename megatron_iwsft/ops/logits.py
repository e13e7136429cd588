"""Row-wise operations of the log-prob operator on logits: softmax statistics and gradient. Triton on a GPU, torch elsewhere.

n rows, V columns (this rank's part of the vocabulary, without padding); a target outside 0 … V−1 belongs to another rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

# On CPU, rows are processed in parts of this many float32 bytes, which stay in a core's cache over all passes.
_CACHE_BYTES = 2**20
_GPU_BYTES = 2**28


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def row_statistics(logits: Tensor, target: Tensor, *, out: Tensor) -> None:
    """Write softmax statistics of every row into out, float32 [3 or 4, n].

    out[0]: maximum; out[1]: Σ exp(logit − maximum); out[2]: target logit (0 if the target belongs to another rank);
    out[3], if present: Σ exp(logit − maximum) · (logit − maximum).
    logits [n, V] float32 or bfloat16, target int64 [n]. If V is 0, the maximum is the lowest finite float and the rest 0.
    """
    if logits.shape[1] == 0:
        out.zero_()
        out[0] = torch.finfo(torch.float32).min
    elif logits.is_cuda and has_triton():
        from megatron_iwsft.ops import logits_triton as rows_triton

        rows_triton.row_statistics(logits, target, out)
    else:
        for part in _parts(logits):
            _row_statistics(logits[part], target[part], out[:, part])


def logits_gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> None:
    """Overwrite logits by grad · d(target log-prob)/d(logits) = grad · (onehot − softmax).

    lse: log-sum-exp over the columns of all ranks, float32 [n]; grad: float32 [n].
    """
    if logits.numel() == 0:
        return
    if logits.is_cuda and has_triton():
        from megatron_iwsft.ops import logits_triton as rows_triton

        rows_triton.logits_gradient(logits, target, lse, grad)
    else:
        for part in _parts(logits):
            _logits_gradient(logits[part], target[part], lse[part], grad[part])


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a · b in float32 for bfloat16 a [m, n] and b [n, k], without a full float32 copy of a."""
    b = b.float()
    for start in range(0, a.shape[0], 8192):
        part = slice(start, start + 8192)
        out[part].addmm_(a[part].float(), b)


def add_product_on_gpu(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a · b in float32 for bfloat16 a [m, n] and b [n, k], as one fused matmul with torch 2.10 or newer."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)


def _parts(logits: Tensor) -> Iterator[slice]:
    step = max(1, (_GPU_BYTES if logits.is_cuda else _CACHE_BYTES) // (4 * logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _row_statistics(logits: Tensor, target: Tensor, out: Tensor) -> None:
    here, index = _locate(target, logits.shape[1])
    out[2] = torch.where(here, logits.gather(1, index).squeeze(1).float(), 0.0)
    values = logits.float() if logits.dtype != torch.float32 else logits
    maximum = values.amax(dim=1)
    out[0] = maximum
    shifted = values - maximum.unsqueeze(1)
    exponentials = torch.exp(shifted)
    out[1] = exponentials.sum(dim=1)
    if len(out) == 4:
        out[3] = (exponentials * shifted).sum(dim=1)


def _logits_gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> None:
    here, index = _locate(target, logits.shape[1])
    values = logits.float()  # no copy if logits are float32
    values.sub_(lse.unsqueeze(1)).exp_().mul_(-grad.unsqueeze(1))
    values.scatter_add_(1, index, torch.where(here, grad, 0.0).unsqueeze(1))
    logits.copy_(values)


def _locate(target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(whether the target is on this rank [n], a valid column index [n, 1])."""
    here = (target >= 0) & (target < columns)
    return here, target.clamp(0, columns - 1).unsqueeze(1)
