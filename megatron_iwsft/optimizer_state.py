"""The optimizer's part of a checkpoint: every data-parallel rank saves and loads what it holds, and any layout can load it.

Megatron-Core's distributed optimizer gives a data-parallel rank a range of each parameter's flattened elements. Its own format for
any layout, `fully_reshardable`, has each state in its parameter's shape, and to give it that, gathers all ranges on every rank. But a
range of a row-major array is a few boxes of it. Of a parameter of 4 × 5, elements 3 … 16 are

    . . . a a        the rest of a row,
    b b b b b        whole rows,
    b b b b b
    c c . . .        and the start of one.

Each box is a `ShardedTensor` over the rank's own memory, under Megatron-Core's name for the whole tensor. So the checkpoint holds the
same tensors, and nothing is gathered or copied to make it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def sharded_optimizer_state(
    optimizer: Any, models: Mapping[str, Any], *, loading: bool, metadata: dict[str, Any]
) -> dict[int, Any]:
    """The sharded state dict of Megatron-Core's chained `optimizer`: one entry for each of its parts.

    models: the sharded state dicts of the model chunks, in one. Not collective.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    _create_states(optimizer)
    parts = optimizer.chained_optimizers
    if len(parts) > 1:
        optimizer._synchronize_steps()
    entries = {id(entry.data): entry for entry in nested_values(models) if isinstance(entry, ShardedBase)}
    return {
        i: {**part.state_dict(), "pieces": _pieces_of_states(part, entries)}
        if isinstance(part, DistributedOptimizer)
        else part.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        for i, part in enumerate(parts)
    }


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: Mapping[int, Any]) -> None:
    """Take over what `sharded_optimizer_state` led to."""
    for i, part in enumerate(optimizer.chained_optimizers):
        pieces = state[i].pop("pieces", None)
        part.load_state_dict(state[i])
        if pieces is None:
            continue
        for values in part.optimizer.state.values():
            if "step" in values:
                # A count of its own: Megatron-Core hands all of them one tensor, which each update would then advance.
                values["step"] = values["step"].clone()
        for k, (_, states) in enumerate(_held(part)):
            for name, held in states.items():
                for begin, piece in pieces[k][name].items():
                    held[begin : begin + piece.numel()].copy_(piece.flatten())


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of a few boxes of a row-major array that are, one after the other, its elements start … end − 1."""
    row = math.prod(shape[1:])
    while start < end:
        index, within = divmod(start, row)
        rows = (end - start) // row if within == 0 else 0
        if rows:
            yield (index, *[0] * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * row
            continue
        stop = min(end - index * row, row)
        for offset, sizes in boxes(shape[1:], within, stop):
            yield (index, *offset), (1, *sizes)
        start = index * row + stop


def _held(part: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Each parameter of which this rank holds a range, and its states, each flat and of that range; AdamW's step is not one."""
    for parameter in part.model_param_gbuf_map:
        states = part._get_main_param_and_optimizer_states(parameter)
        yield parameter, {name: state.detach() for name, state in states.items() if name != "step"}


def _pieces_of_states(part: Any, entries: Mapping[int, Any]) -> dict[int, dict[str, dict[int, Any]]]:
    """For each parameter of `_held`, and each of its states, its boxes as `ShardedTensor`s, by where they begin in the flat state."""
    out = {}
    for k, (parameter, states) in enumerate(_held(part)):
        held = part._get_model_param_range_map(parameter)["param"]
        pieces: dict[str, dict[int, Any]] = {name: {} for name in states}
        for shard, first in _shards(entries[id(parameter)]):
            start, end = max(held.start, first), min(held.end, first + math.prod(shard.local_shape))
            begin = start - held.start
            for offset, sizes in boxes(shard.local_shape, start - first, end - first):
                for name, state in states.items():
                    key = f"optimizer.state.{name}.{shard.key}"
                    pieces[name][begin] = _box(key, shard, state[begin:], offset, sizes)
                begin += math.prod(sizes)
        out[k] = pieces
    return out


def _shards(entry: Any) -> Iterator[tuple[Any, int]]:
    """(`ShardedTensor` without data, its first element's place in the flattened parameter) of all that a parameter is saved as.

    Usually one; a factory makes two of a gate and an up-projection that are one parameter.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(entry, ShardedTensorFactory):
        yield entry.without_data(), 0
        return
    for shard in nested_values(replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()):
        assert shard.data.is_contiguous()
        yield shard.without_data(), shard.data.storage_offset()


def _box(key: str, shard: Any, flat: Tensor, offset: Sequence[int], sizes: Sequence[int]) -> Any:
    """A `ShardedTensor` of the first elements of `flat`, which are a box of `shard`."""
    from megatron.core.dist_checkpointing import ShardedTensor

    before = (0,) * shard.prepend_axis_num
    sizes = (1,) * shard.prepend_axis_num + tuple(sizes)
    return ShardedTensor(
        key,
        flat[: math.prod(sizes)].view(sizes),
        flat.dtype,
        sizes,
        shard.global_shape,
        tuple(a + b for a, b in zip(shard.global_offset, (*before, *offset), strict=True)),
        None,  # no regular grid
        replica_id=(*shard.replica_id[:2], 0),  # no two data-parallel ranks hold the same
        allow_shape_mismatch=shard.allow_shape_mismatch,
    )


def _create_states(optimizer: Any) -> None:
    """Give AdamW its states, which it makes at its first step, so that there is something to load into or to save.

    A step at learning rate 0 over gradients of 0, which changes nothing but the step counts; they are set back.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Optimizer) or inner.state:
            continue
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:
                group["step"] = 0
        for values in inner.state.values():
            if "step" in values:
                values["step"] = torch.zeros_like(values["step"])
