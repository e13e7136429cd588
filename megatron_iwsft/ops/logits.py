"""Row-wise operations of the log-prob operator on logits: softmax statistics and gradient. Triton on a GPU, torch elsewhere.

n rows, V columns (this rank's part of the vocabulary, without padding); a target outside 0 … V−1 belongs to another rank.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

# On CPU, rows are processed in parts of this many float32 bytes, which stay in a core's cache over all passes.
_CACHE_BYTES = 2**20
_GPU_BYTES = 2**28


# Elements that a row of logits takes should be a multiple of this many, for 16-byte loads in the Triton kernels (what Triton checks).
ROW_ALIGNMENT = 16

log = logging.getLogger(__name__)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_refusal(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be used on this GPU, found by launching one; None if they can. Logs a failed launch, once.

    At its first launch Triton builds a small C extension, so it needs a C compiler and Python's headers.
    """
    if not has_triton():
        return "Triton is not installed"
    try:
        from megatron_iwsft.ops import logits_triton

        target = torch.zeros(1, dtype=torch.int64, device=device)
        logits_triton.row_statistics(torch.zeros(1, 16, device=device), target, torch.zeros(3, 1, device=device))
    except Exception as error:  # a missing compiler, header, driver or assembler: each raises something else
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning(
            "The log-prob operator uses torch in place of its Triton kernels, which is slower: Triton cannot launch a kernel (%s). "
            "It needs a C compiler (gcc, clang or $CC) and Python's headers.",
            text,
        )
        return f"Triton cannot launch a kernel: {text}"
    return None


def row_statistics(logits: Tensor, target: Tensor, *, out: Tensor) -> None:
    """Write softmax statistics of every row into out, float32 [3 or 4, n].

    out[0]: maximum; out[1]: Σ exp(logit − maximum); out[2]: target logit (0 if the target belongs to another rank);
    out[3], if present: Σ exp(logit − maximum) · (logit − maximum).
    logits [n, V] float32 or bfloat16, target int64 [n]. If V is 0, the maximum is the lowest finite float and the rest 0.
    """
    if logits.shape[1] == 0:
        out.zero_()
        out[0] = torch.finfo(torch.float32).min
    elif _takes_triton(logits):
        from megatron_iwsft.ops import logits_triton

        logits_triton.row_statistics(logits, target, out)
    else:
        for part in _parts(logits):
            _row_statistics(logits[part], target[part], out[:, part])


def logits_gradient(logits: Tensor, target: Tensor, lse: Tensor, grad: Tensor) -> None:
    """Overwrite logits by grad · d(target log-prob)/d(logits) = grad · (onehot − softmax).

    lse: log-sum-exp over the columns of all ranks, float32 [n]; grad: float32 [n].
    """
    if logits.numel() == 0:
        return
    if _takes_triton(logits):
        from megatron_iwsft.ops import logits_triton

        logits_triton.logits_gradient(logits, target, lse, grad)
    else:
        for part in _parts(logits):
            _logits_gradient(logits[part], target[part], lse[part], grad[part])


def logits_buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised logits [rows, columns] of like's dtype and device, whose rows start at multiples of 16 bytes for any vocabulary."""
    padded = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer = like.new_empty(rows, padded)
    # Some CPUs' bfloat16 matmuls read the padding, and 0 times what was in memory can be NaN.
    buffer[:, columns:].zero_()
    return buffer[:, :columns]


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


def _takes_triton(logits: Tensor) -> bool:
    return logits.is_cuda and triton_refusal(logits.device) is None


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
