"""Saving replicated weights once, by all the ranks that hold them.

Data- and context-parallel ranks hold the same weights. Megatron-Core has the first of them write all; for 70B at TP 2 × PP 4 that is
18 GB on one rank of 128 and nothing on the others. Its `FullyParallelSaveStrategyWrapper` gives whole tensors to ranks, for which all
ranks exchange lists of everything that each holds. Here nothing is exchanged: laid end to end, in an order that is the same on all of
them, the weights are cut into equal ranges of bytes, at the next row of a tensor, and every rank writes its own range.

Each range is in a file of its own, which every rank that loads these weights has to open. So a range has at least _LEAST_BYTES: of many
replicas only the first ones write, and the files do not become more with the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_iwsft.distributed.parallel_layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

_NOT_REPLICATED = "optimizer"  # in a sharded state dict: every rank has its own part
_EXPERTS = ".mlp.experts."  # in keys; experts are replicated over fewer ranks
_LEAST_BYTES = 2**25  # that a rank writes, unless it is nothing or all


def spread_over_replicas(state: dict[str, Any], layout: ParallelLayout) -> None:
    """Share out what data- and context-parallel ranks hold alike in a sharded state dict, changing it in place. Not collective.

    layout: of the ranks; its degrees say how many hold the same. Checkpoints hold the same tensors afterwards, in other pieces.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import apply_factories

    parts = {name: part for name, part in state.items() if name != _NOT_REPLICATED}
    apply_factories(parts)
    shared = [entry for entry in _tensors(parts) if _is_shared(entry)]
    pieces: dict[int, ShardedTensor] = {}
    dense, experts = layout.data * layout.context, layout.ranks_per_stage // layout.expert
    for replicas, of_experts in ((dense, False), (experts, True)):
        pieces |= _own_pieces([e for e in shared if (_EXPERTS in e.key) == of_experts], replicas)
    dict_list_map_inplace(lambda entry: pieces.get(id(entry), entry), parts)
    state |= parts


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _is_shared(entry: ShardedTensor) -> bool:
    """Whether this rank is among those of which one must write `entry`: replica ids end with the data-parallel rank."""
    return isinstance(entry.replica_id, tuple) and not any(entry.replica_id[:-1])


def _own_pieces(entries: Iterable[ShardedTensor], replicas: int) -> dict[int, ShardedTensor]:
    """id of an entry → what this rank writes of it, one of `replicas` ranks with the same entries; nothing has a replica id above 0."""
    entries = list(entries)
    total = sum(entry.data.nbytes for entry in entries)
    writers = max(1, min(replicas, total // _LEAST_BYTES))
    found: dict[int, ShardedTensor] = {}
    at = 0
    for entry in entries:
        rank = entry.replica_id[-1]
        rows = _rows(entry)
        row_bytes = max(1, entry.data.nbytes // max(1, rows))
        # A row is written by the rank in whose range of bytes it begins.
        first, end = (min(rows, max(0, -(-(total * r // writers - at) // row_bytes))) for r in (rank, rank + 1))
        if rank == writers - 1:
            end = rows
        found[id(entry)] = _piece(entry, first, end, rows)
        at += entry.data.nbytes
    return found


def _rows(entry: ShardedTensor) -> int:
    """Into how many pieces a tensor can be cut, along its first dimension. FP8 tensors stay whole: their scales belong to all of it."""
    from megatron.core.fp8_utils import is_float8tensor

    return 1 if is_float8tensor(entry.data) or not entry.local_shape else entry.local_shape[0]


def _piece(entry: ShardedTensor, first: int, end: int, rows: int) -> ShardedTensor:
    """Rows first … end − 1 of `entry`, to be written; where there are none, `entry` as a replica that another rank writes."""
    others = (0,) * (len(entry.replica_id) - 1)
    if end <= first:
        return replace(entry, replica_id=(*others, 1))
    if end - first == rows:
        return replace(entry, replica_id=(*others, 0))
    sizes = (end - first, *entry.local_shape[1:])
    shape = ((1,) * entry.prepend_axis_num) + sizes
    offset = list(entry.global_offset)
    offset[entry.prepend_axis_num] += first
    assert math.prod(shape) == entry.data[first:end].numel()
    return replace(
        entry,
        data=entry.data[first:end].contiguous().view(shape),
        local_shape=shape,
        global_offset=tuple(offset),
        prepend_axis_num=0,
        axis_fragmentations=None,  # no regular grid
        replica_id=(*others, 0),
    )
