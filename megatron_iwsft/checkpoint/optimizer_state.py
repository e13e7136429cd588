"""The optimizer's part of a checkpoint: every rank saves and loads its own shard, in a format that any layout can load.

Megatron-Core's distributed optimizer gives a data-parallel rank a range of each parameter's flattened elements. Its own reshardable
format, `fully_reshardable`, saves each state in its parameter's shape, and gathers all ranges on every rank to get there. But a
range of a row-major array decomposes into a few rectangular blocks. Elements 3 … 16 of a parameter of 4 × 5 are

    . . . a a        the rest of a row,
    b b b b b        full rows,
    b b b b b
    c c . . .        and the start of one.

Each box is a `ShardedTensor` over the rank's own memory, under Megatron-Core's name for the full tensor. The checkpoint holds the same
tensors as Megatron-Core's, and nothing is gathered or copied to write it. An optimizer that is not distributed has one box per parameter.

Besides the states, the number of updates is saved. Learning rates and other settings are not: they come from the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_iwsft.distributed.mcore_compat import OptimizerShard, inner_optimizers, optimizer_shards

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
    from megatron.core.optimizer import MegatronOptimizer


def sharded_optimizer_state(optimizer: MegatronOptimizer, models: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state dict of Megatron-Core's chained `optimizer`. Not collective.

    models: the sharded state dicts of all model chunks, merged.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    for inner in inner_optimizers(optimizer):
        _create_states(inner)
    entries = {id(entry.data): entry for entry in nested_values(models) if isinstance(entry, ShardedBase)}
    return {
        "updates": max((int(c["step"]) for inner in inner_optimizers(optimizer) for c in _counters(inner)), default=0),
        "states": {
            k: boxes_of(shard, entries[id(shard.parameter)]) for k, shard in enumerate(optimizer_shards(optimizer))
        },
    }


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, state: Mapping[str, Any]) -> None:
    """Take over a loaded `sharded_optimizer_state`."""
    for k, shard in enumerate(optimizer_shards(optimizer)):
        for name, values in _states(shard).items():
            for begin, box in state["states"][k][name].items():
                # The library fills the memory it was given, but promises only to return what it has read.
                values[begin : begin + box.numel()].copy_(box.flatten())
    for inner in inner_optimizers(optimizer):
        _set_counters(inner, state["updates"])


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of the boxes of a row-major array that together are its elements start … end − 1, in order."""
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


def _states(shard: OptimizerShard) -> dict[str, Tensor]:
    """The float32 parameter and AdamW's averages, flat; Megatron-Core's names."""
    state = shard.inner.state[shard.main]
    states = {"param": shard.main, **{name: state[name] for name in ("exp_avg", "exp_avg_sq")}}
    return {name: state.detach().view(-1) for name, state in states.items()}


def _counters(inner: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Where AdamW counts its updates, as `step`: torch's by parameter, Transformer Engine's by group."""
    return (values for values in (*inner.param_groups, *inner.state.values()) if "step" in values)


def _set_counters(inner: torch.optim.Optimizer, updates: int) -> None:
    for values in _counters(inner):
        values["step"] = torch.full_like(values["step"], updates) if isinstance(values["step"], Tensor) else updates


def boxes_of(held: OptimizerShard, entry: ShardedBase) -> dict[str, dict[int, ShardedTensor]]:
    """State → where it begins in the flat state → `ShardedTensor`, one for each box. entry: what the parameter is saved as."""
    states = _states(held)
    found: dict[str, dict[int, ShardedTensor]] = {name: {} for name in states}
    begin = 0
    for shard, first in _shards(entry):
        start, end = max(held.start, first), min(held.end, first + math.prod(shard.local_shape))
        for offset, sizes in boxes(shard.local_shape, start - first, end - first):
            for name, values in states.items():
                key = f"optimizer.state.{name}.{shard.key}"
                found[name][begin] = _sharded(key, values[begin:], shard, offset, sizes, replicated=held.replicated)
            begin += math.prod(sizes)
    assert begin == held.end - held.start, f"{entry.key}: {begin} elements of {held.end - held.start} are covered"
    return found


def _shards(entry: ShardedBase) -> Iterator[tuple[ShardedTensor, int]]:
    """What a parameter is saved as: (`ShardedTensor` without data, position of its first element in the flattened parameter).

    Usually one; two where gate and up projection are one parameter.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(entry, ShardedTensorFactory):
        yield entry.without_data(), 0
        return
    for shard in nested_values(replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()):
        assert shard.data.is_contiguous(), f"{shard.key} is not a range of its parameter"
        yield shard.without_data(), shard.data.storage_offset()


def _sharded(
    key: str, values: Tensor, shard: ShardedTensor, offset: Sequence[int], sizes: Sequence[int], *, replicated: bool
) -> ShardedTensor:
    """A `ShardedTensor` of the first of `values`, which are a box of `shard`."""
    from megatron.core.dist_checkpointing import ShardedTensor

    ones, zeros = (1,) * shard.prepend_axis_num, (0,) * shard.prepend_axis_num
    shape = (*ones, *sizes)
    return ShardedTensor(
        key,
        values[: math.prod(shape)].view(shape),
        values.dtype,
        shape,
        shard.global_shape,
        tuple(a + b for a, b in zip(shard.global_offset, (*zeros, *offset), strict=True)),
        None,  # no regular grid
        replica_id=shard.replica_id if replicated else (*shard.replica_id[:2], 0),  # the last is the data-parallel rank
        allow_shape_mismatch=shard.allow_shape_mismatch,
    )


def _create_states(inner: torch.optim.Optimizer) -> None:
    """Create AdamW's states, which it would create at its first step, so that they can be loaded into or saved.

    A step at learning rate 0 with gradients of 0 changes nothing but the update counts, which are reset.
    """
    if inner.state:
        return
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    inner.step()
    inner.zero_grad()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate
    _set_counters(inner, 0)
