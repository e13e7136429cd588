"""Vocabulary-parallel log-probs from hidden states: output projection and log-softmax as one operation.

Full logits [T, V/tp] never exist. Positions that are not trained on are not projected. For each projected row only the
log-sum-exp is kept; backward recomputes a chunk of logits at a time from it and needs no statistics of other ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.batch import IGNORE

# Logits of one chunk in float32 hold about this many bytes.
_CHUNK_BYTES = 128 * 2**20


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """log softmax(hidden · Wᵀ)[target] for every trained position.

    hidden   [T, H] float32 or bfloat16, the same on every rank of `group`; with `sequence_parallel` this rank's [T/tp, H] slice
    weight   [V/tp, H]: this rank's rows of the output projection, rank r holding rows r·V/tp …
    targets  [T] int64, token ids, IGNORE where nothing is trained; the same on every rank
    vocab_size  ids from here to V are padding: excluded from the softmax
    chunk_size  rows projected at a time; None takes what 128 MiB of float32 logits hold

    Returns float32 [T], 0 where IGNORE, the same on every rank. The softmax is float32 for every input dtype; the gradient
    of hidden comes in its dtype, that of weight is accumulated over chunks in float32 and, where Megatron-Core keeps a
    float32 `main_grad`, straight into it.

    Collectives, forward: one all-gather of [3, trained] float32 statistics (merged in rank order); with `sequence_parallel` an
    all-gather of hidden. Backward: the gradient's own all-reduce, or with `sequence_parallel` its reduce-scatter.
    """
    return _VocabParallelLogprob.apply(hidden, weight, targets, group, vocab_size, chunk_size, sequence_parallel)


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        chunk_size: int | None,
        sequence_parallel: bool,
    ) -> Tensor:
        if sequence_parallel and group.size() > 1:
            hidden = _all_gather_rows(hidden, group)
        rows = torch.nonzero(targets != IGNORE).flatten()
        trained = hidden.index_select(0, rows)
        first_row = group.rank() * weight.shape[0]
        local_target = targets.index_select(0, rows) - first_row
        valid = max(0, min(weight.shape[0], vocab_size - first_row))
        chunk = chunk_size or max(1, _CHUNK_BYTES // (4 * weight.shape[0]))

        stats = hidden.new_empty((3, rows.numel()), dtype=torch.float32)
        for start in range(0, rows.numel(), chunk):
            part = slice(start, start + chunk)
            logits = _logits(trained[part], weight, valid)
            _chunk_statistics(logits, local_target[part], out=stats[:, part])
        lse, target_logit = _merge_statistics(stats, group)

        ctx.save_for_backward(trained, weight, rows, local_target, lse)
        ctx.group, ctx.valid, ctx.chunk = group, valid, chunk
        ctx.sequence_parallel, ctx.num_tokens = sequence_parallel and group.size() > 1, targets.numel()
        out = torch.zeros(targets.numel(), dtype=torch.float32, device=hidden.device)
        return out.index_copy_(0, rows, target_logit - lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trained, weight, rows, local_target, lse = ctx.saved_tensors
        grad = grad.index_select(0, rows).float()
        grad_trained = torch.empty_like(trained)
        weight_grad = _WeightGrad(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, rows.numel(), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            dlogits = _chunk_dlogits(
                _logits(trained[part], weight, ctx.valid), local_target[part], lse[part], grad[part]
            ).to(trained.dtype)
            torch.mm(dlogits, weight, out=grad_trained[part])
            if weight_grad is not None:
                weight_grad.add(dlogits, trained[part])
        grad_hidden = grad_trained.new_zeros(ctx.num_tokens, trained.shape[1])
        grad_hidden.index_copy_(0, rows, grad_trained)
        if ctx.sequence_parallel:
            grad_hidden = _reduce_scatter_rows(grad_hidden, ctx.group)
        elif ctx.group.size() > 1:
            _all_reduce(grad_hidden, ctx.group)
        return grad_hidden, weight_grad.result() if weight_grad else None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, valid: int) -> Tensor:
    """float32 [n, V/tp]; padded columns are −inf."""
    logits = (hidden @ weight.t()).float()
    if valid < weight.shape[0]:
        logits[:, valid:] = -torch.inf
    return logits


def _chunk_statistics(logits: Tensor, local_target: Tensor, *, out: Tensor) -> None:
    """Into out [3, n]: the row maximum, Σ exp(logit − maximum), and the target's logit (0 if another rank holds it).

    Overwrites logits. A rank whose columns are all padding contributes a maximum of the lowest finite float and a sum of 0.
    """
    maximum = logits.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
    here = (local_target >= 0) & (local_target < logits.shape[1])
    index = local_target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    out[2] = torch.where(here, logits.gather(1, index).squeeze(1), 0.0)
    out[0] = maximum
    out[1] = logits.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1)


def _merge_statistics(stats: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, target logit), each float32 [n], from every rank's statistics, in rank order."""
    if group.size() > 1:
        gathered = [torch.empty_like(stats) for _ in range(group.size())]
        dist.all_gather(gathered, stats, group=group)
    else:
        gathered = [stats]
    maximum = torch.stack([s[0] for s in gathered]).amax(dim=0)
    total = torch.zeros_like(maximum)
    target = torch.zeros_like(maximum)
    for s in gathered:
        total += s[1] * torch.exp(s[0] - maximum)
        target += s[2]
    return maximum + torch.log(total), target


def _chunk_dlogits(logits: Tensor, local_target: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """d(log-prob)/d(logits) · grad = grad · (onehot − softmax), in place of logits. float32 [n, V/tp]."""
    softmax = logits.sub_(lse.unsqueeze(1)).exp_()
    dlogits = softmax.mul_(-grad.unsqueeze(1))
    here = (local_target >= 0) & (local_target < logits.shape[1])
    index = local_target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    return dlogits.scatter_add_(1, index, torch.where(here, grad, 0.0).unsqueeze(1))


class _WeightGrad:
    """Accumulates dlogitsᵀ · hidden in float32 over chunks, into Megatron-Core's `main_grad` where there is one.

    The contract with Megatron-Core's DistributedDataParallel (distributed_data_parallel.py, the backward hook): a gradient
    that was added to `main_grad` is announced by `grad_added_to_main_grad`, and a stand-in is returned so that its hook runs.
    The stand-in is zero because the hook does add it where the weight is shared with the embedding (`zero_out_wgrad`).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if self.main_grad is not None and self.main_grad.dtype != torch.float32:
            self.main_grad = None
        self.total = (
            self.main_grad if self.main_grad is not None else weight.new_zeros(weight.shape, dtype=torch.float32)
        )

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if dlogits.dtype == torch.float32:
            self.total.addmm_(dlogits.t(), hidden)
        elif dlogits.is_cuda:
            torch.addmm(self.total, dlogits.t(), hidden, out_dtype=torch.float32, out=self.total)
        else:
            self.total.addmm_(dlogits.t().float(), hidden.float())

    def result(self) -> Tensor:
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        return torch.zeros((), dtype=self.weight.dtype, device=self.weight.device).expand(self.weight.shape)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(tensor, group=group)


def _all_gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
    dist.all_gather_into_tensor(out, local.contiguous(), group=group)
    return out


def _reduce_scatter_rows(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = full.new_empty((full.shape[0] // group.size(), *full.shape[1:]))
    dist.reduce_scatter_tensor(out, full, group=group)
    return out
