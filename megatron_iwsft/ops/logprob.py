"""Vocabulary-parallel log-probs from hidden states: output projection and log-softmax as one operator.

Full logits [T, V/tp] are never materialised: rows are projected chunk by chunk into one buffer. Untrained positions and padded
columns are not projected. Forward saves the log-sum-exp of each row; backward recomputes the logits of a chunk and needs no
statistics of other ranks. The last chunk's logits stay in the buffer from forward to backward, so if all rows fit into one chunk
nothing is computed twice.

Per chunk, forward: logits (a matmul), then maximum, Σ exp and target logit in one pass over them (`row_statistics`).
Backward: logits, their gradient in place (`logits_gradient`), then two matmuls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.data.batch import IGNORE
from megatron_iwsft.ops.logits import add_product, add_product_on_gpu, logits_buffer, logits_gradient, row_statistics

# Maximum size of the logits buffer in bytes. Fixed, and not a fraction of free memory: weight gradients are summed over chunks,
# so the chunk size affects rounding, and results must not depend on what else is in memory.
CHUNK_BYTES = 2**30


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    entropy: Tensor | None = None,
    trained: Tensor | None = None,
) -> Tensor:
    """log softmax(hidden · Wᵀ)[target] for every trained position.

    hidden      [T, H] float32 or bfloat16, the same on every rank of `group`; with `sequence_parallel` this rank's [T/tp, H]
    weight      [V/tp, H]: this rank's rows of the output projection; rank r holds rows r·V/tp …
    targets     [T] int64 token ids, IGNORE at untrained positions; the same on every rank
    vocab_size  ids from here to V are padding and are excluded from the softmax
    chunk_size  rows per chunk; None: as many as fit into CHUNK_BYTES of logits, in chunks of about equal size
    entropy     optional float32 [T] output: entropy of the distribution at each trained position (nats, no gradient)
    trained     int64 positions of the targets that are not IGNORE, ascending. None: found here, and the host waits for the GPU

    Returns float32 [T], 0 where IGNORE, the same on every rank. The softmax is float32 for every input dtype. The gradient of hidden
    has its dtype; that of weight is accumulated over chunks in float32, directly in Megatron-Core's `main_grad` if it is float32.

    Repeated calls are bitwise equal. chunk_size affects rounding only: matmuls of other shapes may use other kernels, and weight
    gradients are summed chunk by chunk.

    Collectives, forward: one all-gather of [3 (4 with entropy), trained] float32 statistics, merged in rank order; with
    `sequence_parallel` also an all-gather of hidden. Backward: one all-reduce of the gradient of hidden, or with `sequence_parallel`
    its reduce-scatter, overlapped with the last chunk's weight gradient.
    """
    return _VocabParallelLogprob.apply(
        hidden, weight, targets, group, vocab_size, chunk_size, sequence_parallel, entropy, trained
    )


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
        entropy: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        if sequence_parallel and group.size() > 1:
            hidden = _all_gather_rows(hidden, group)
        if index is None:
            index = torch.nonzero(targets != IGNORE).flatten()
        trained = hidden.index_select(0, index)
        first_row = group.rank() * weight.shape[0]
        local_target = targets.index_select(0, index) - first_row
        weight_rows = weight[: max(0, min(weight.shape[0], vocab_size - first_row))]  # without padding
        chunks = _chunks(trained, weight.shape[0], chunk_size)

        buffer = logits_buffer(trained, _longest(chunks), weight_rows.shape[0])
        stats = hidden.new_empty((3 if entropy is None else 4, index.numel()), dtype=torch.float32)
        for chunk in chunks:
            logits = torch.mm(trained[chunk], weight_rows.t(), out=buffer[: chunk.stop - chunk.start])
            row_statistics(logits, local_target[chunk], out=stats[:, chunk])
        lse, target_logit, row_entropy = _merge_statistics(stats, group)

        ctx.save_for_backward(trained, weight, index, local_target, lse)
        ctx.group, ctx.chunks, ctx.valid = group, chunks, weight_rows.shape[0]
        ctx.sequence_parallel, ctx.num_tokens = sequence_parallel and group.size() > 1, targets.numel()
        ctx.buffer = buffer if any(ctx.needs_input_grad) else None  # holds the last chunk's logits
        if entropy is not None and row_entropy is not None:
            entropy.zero_().index_copy_(0, index, row_entropy)
        out = torch.zeros(targets.numel(), dtype=torch.float32, device=hidden.device)
        return out.index_copy_(0, index, target_logit - lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trained, weight, index, local_target, lse = ctx.saved_tensors
        weight_rows = weight[: ctx.valid]
        grad = grad.index_select(0, index).float()
        grad_trained = torch.empty_like(trained)
        weight_grad = _WeightGrad(weight, ctx.valid) if ctx.needs_input_grad[1] else None
        kept, ctx.buffer = ctx.buffer, None
        # The buffer is gone in a second backward through the same graph.
        buffer = kept if kept is not None else logits_buffer(trained, _longest(ctx.chunks), ctx.valid)
        last = ctx.chunks[-1] if ctx.chunks else slice(0, 0)

        def input_gradient(chunk: slice, *, recompute: bool) -> Tensor:
            logits = buffer[: chunk.stop - chunk.start]
            if recompute:
                torch.mm(trained[chunk], weight_rows.t(), out=logits)
            logits_gradient(logits, local_target[chunk], lse[chunk], grad[chunk])
            torch.mm(logits, weight_rows, out=grad_trained[chunk])
            return logits

        # The chunk whose logits are in the buffer comes first. The collective starts before the last weight gradient.
        order = [last, *ctx.chunks[:-1]]
        for number, chunk in enumerate(order):
            dlogits = input_gradient(chunk, recompute=kept is None or number > 0)
            if number == len(order) - 1:
                grad_hidden = grad_trained.new_zeros(ctx.num_tokens, trained.shape[1])
                grad_hidden.index_copy_(0, index, grad_trained)
                grad_hidden, arrival = _reduce(grad_hidden, ctx.group, sequence_parallel=ctx.sequence_parallel)
            if weight_grad is not None:
                weight_grad.add(dlogits, trained[chunk])
        if arrival is not None:
            arrival.wait()
        return grad_hidden, weight_grad.result() if weight_grad else None, *[None] * 7


def _chunks(trained: Tensor, columns: int, chunk_size: int | None) -> list[slice]:
    """Split the trained rows into consecutive chunks of about equal size."""
    total = trained.shape[0]
    most = chunk_size or max(1, CHUNK_BYTES // (columns * trained.element_size()))
    count = -(-total // most)
    size = -(-total // count) if count else 0
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] if count else []


def _longest(chunks: list[slice]) -> int:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def _merge_statistics(stats: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge the statistics of all ranks in rank order: (log-sum-exp, target logit, entropy or None), each float32 [n]."""
    if group.size() > 1:
        gathered = [torch.empty_like(stats) for _ in range(group.size())]
        dist.all_gather(gathered, stats.contiguous(), group=group)
    else:
        gathered = [stats]
    maximum = torch.stack([s[0] for s in gathered]).amax(dim=0)
    total, target, surplus = (torch.zeros_like(maximum) for _ in range(3))
    for s in gathered:
        scale = torch.exp(s[0] - maximum)
        total += s[1] * scale
        target += s[2]
        if stats.shape[0] == 4:
            surplus += (s[3] + (s[0] - maximum) * s[1]) * scale
    entropy = torch.log(total) - surplus / total if stats.shape[0] == 4 else None
    return maximum + torch.log(total), target, entropy


class _WeightGrad:
    """Accumulates dlogitsᵀ · hidden in float32 over chunks, in Megatron-Core's `main_grad` if there is one.

    Contract with Megatron-Core's DistributedDataParallel (distributed_data_parallel.py, the backward hook): after adding to
    `main_grad`, set `grad_added_to_main_grad` and return a dummy gradient so that the hook runs. The dummy is zero because the
    hook adds it if the weight is shared with the embedding (`zero_out_wgrad`).
    """

    def __init__(self, weight: Tensor, valid: int) -> None:
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if self.main_grad is not None and self.main_grad.dtype != torch.float32:
            self.main_grad = None
        self.total = self.main_grad if self.main_grad is not None else torch.zeros_like(weight, dtype=torch.float32)
        self._rows = self.total[:valid]

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if dlogits.dtype == torch.float32:
            self._rows.addmm_(dlogits.t(), hidden)
        elif dlogits.is_cuda:
            add_product_on_gpu(self._rows, dlogits.t(), hidden)
        else:
            add_product(self._rows, dlogits.t(), hidden)

    def result(self) -> Tensor:
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        setattr(self.weight, "grad_added_to_main_grad", True)  # noqa: B010 - an attribute of Megatron-Core's
        return torch.zeros((), dtype=self.weight.dtype, device=self.weight.device).expand(self.weight.shape)


def _reduce(grad: Tensor, group: dist.ProcessGroup, *, sequence_parallel: bool) -> tuple[Tensor, dist.Work | None]:
    """Start summing [T, H] over the group: an all-reduce, or with `sequence_parallel` a reduce-scatter to [T/tp, H]."""
    if group.size() == 1:
        return grad, None
    if not sequence_parallel:
        return grad, _all_reduce(grad, group)
    out = grad.new_empty((grad.shape[0] // group.size(), grad.shape[1]))
    return out, dist.reduce_scatter_tensor(out, grad, group=group, async_op=True)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    return dist.all_reduce(tensor, group=group, async_op=True)


def _all_gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
    dist.all_gather_into_tensor(out, local.contiguous(), group=group)
    return out
