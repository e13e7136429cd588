"""Core attention of the local backend: packed segments, sliding windows and context parallelism, in plain torch.

Megatron-Core's local attention supports none of these. Attention is causal within each segment. In half precision on a GPU, if torch
supports it (`variable_length_attention`), all segments are one call; otherwise there is one call per segment, or per run of segments of
equal length. With context parallelism, each rank has two chunks of every segment (`Batch.slice_for_context_parallel`), and keys and
values are all-gathered.
"""

from __future__ import annotations

import inspect
import itertools
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_iwsft.data.batch import zigzag_index
from megatron_iwsft.distributed.capabilities import variable_length_attention
from megatron_iwsft.model.moe import PackedRow


class PackedAttention(torch.nn.Module):
    """Core attention module for Megatron-Core over packed rows (`packed_seq_params` with `qkv_format="thd"`). No parameters, no dropout.

    query [T, heads/tp, head_dim], key and value [T, groups/tp, head_dim] → [T, heads/tp · head_dim], T tokens of this rank.
    Collectives with context parallelism: forward all-gathers keys and values, backward reduce-scatters their gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        self.cp_group: dist.ProcessGroup = pg_collection.cp
        self.variable_length, _ = variable_length_attention()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedRow,
        **unused: Any,
    ) -> Tensor:
        if self.cp_group.size() > 1:
            boundaries = packed_seq_params.boundaries
            key, value = _GatherSegments.apply(torch.stack([key, value]), boundaries, self.cp_group)
            out = _attend_chunks(query, key, value, boundaries, self.cp_group, self.scale, self.window)
        elif self.variable_length and query.is_cuda and fits_at_once(query.dtype, query.shape[-1]):
            out = _attend_at_once(query, key, value, packed_seq_params, self.scale, self.window)
        else:
            out = _attend(query, key, value, packed_seq_params.boundaries, self.scale, self.window)
        return out.flatten(1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """No parameters to save (Megatron-Core calls this on every submodule)."""
        return {}


def fits_at_once(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention accepts such queries without padding."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each segment, with one call of torch's variable-length FlashAttention (half precision, GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = dict(scale=scale, window_size=(-1 if window is None else window - 1, 0))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # before torch 2.12
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    boundaries, longest = row.cu_seqlens_q, row.max_seqlen_q
    out = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
    assert isinstance(out, Tensor), "it returns a tuple only if asked for more"
    return out


def _attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: tuple[int, ...], scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each segment. Consecutive segments of equal length are one batched call."""
    outs = []
    i = 0
    while i < len(boundaries) - 1:
        start, length = boundaries[i], boundaries[i + 1] - boundaries[i]
        n = 1
        while i + n < len(boundaries) - 1 and boundaries[i + n + 1] - boundaries[i + n] == length:
            n += 1
        part = slice(start, start + n * length)
        q, k, v = (x[part].unflatten(0, (n, length)).transpose(1, 2) for x in (query, key, value))
        visible = None if window is None or window >= length else _visible(length, length, window, q.device)
        out = scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
        i += n
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[int, ...],
    group: dist.ProcessGroup,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of this rank's two chunks of each segment to the keys of the full segment, up to the end of the chunk."""
    rank, size = group.rank(), group.size()
    outs = []
    at = 0
    for start, stop in itertools.pairwise(boundaries):
        chunk = (stop - start) // (2 * size)
        for i in (rank, 2 * size - 1 - rank):
            end = (i + 1) * chunk
            q = query[at : at + chunk].transpose(0, 1)[None]
            k, v = (x[start : start + end].transpose(0, 1)[None] for x in (key, value))
            visible = _visible(chunk, end, window, q.device)
            out = scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out[0].transpose(0, 1))
            at += chunk
    return torch.cat(outs)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask with optional window, bool [queries, keys]; the queries are the last `queries` of the `keys` positions."""
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return visible if window is None else visible.triu(keys - queries - window + 1)


class _GatherSegments(torch.autograd.Function):
    """All-gather keys and values: [2, T/cp, …] per rank → [T, …] each, in sequence order. Backward reduce-scatters the gradients."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, boundaries: tuple[int, ...], group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        order = _gathered_positions(boundaries, group.size()).to(local.device)
        full = torch.empty_like(torch.cat(parts, dim=1))
        full[:, order] = torch.cat(parts, dim=1)
        ctx.group, ctx.order = group, order
        return full[0], full[1]

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, None, None]:
        grads = torch.stack([grad_key, grad_value])[:, ctx.order]
        by_rank = torch.cat(grads.chunk(ctx.group.size(), dim=1))
        out = torch.empty_like(by_rank[:2])
        dist.reduce_scatter_tensor(out, by_rank, group=ctx.group)
        return out, None, None


@lru_cache(maxsize=64)
def _gathered_positions(boundaries: tuple[int, ...], size: int) -> Tensor:
    """Position in the full row of each gathered token: rank 0's tokens in local order, then rank 1's, …"""
    import numpy as np

    cu_seqlens = np.asarray(boundaries)
    return torch.from_numpy(np.concatenate([zigzag_index(cu_seqlens, r, size) for r in range(size)]))
