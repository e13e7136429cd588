"""The optimizer's part of a checkpoint: every rank saves and loads what it holds, and any layout can load it.

Megatron-Core's distributed optimizer gives a data-parallel rank a range of each parameter's flattened elements. Its own format for
any layout, `fully_reshardable`, has each state in its parameter's shape, and to give it that, gathers all ranges on every rank. But a
range of a row-major array is a few boxes of it. Of a parameter of 4 × 5, elements 3 … 16 are

    . . . a a        the rest of a row,
    b b b b b        whole rows,
    b b b b b
    c c . . .        and the start of one.

Each box is a `ShardedTensor` over the rank's own memory, under Megatron-Core's name for the whole tensor. So the checkpoint holds the
same tensors, and nothing is gathered or copied to make it. An optimizer that is not distributed holds whole parameters: one box each.

Beside the states there is the count of updates. Learning rates and the like are not saved: they are the config's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Held:
    """What this rank's optimizer holds of one parameter: the states of its elements start … end − 1, each flat."""

    parameter: Any
    start: int
    end: int
    states: dict[str, Tensor]
    replicated: bool  # over data-parallel ranks


def sharded_optimizer_state(optimizer: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state dict of Megatron-Core's `optimizer`, whose parts are those of `chained_optimizers`. Not collective.

    models: the sharded state dicts of the model chunks, in one.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    for part in _parts(optimizer):
        _create_states(part.optimizer)
    entries = {id(entry.data): entry for entry in nested_values(models) if isinstance(entry, ShardedBase)}
    return {
        "updates": max((int(c["step"]) for part in _parts(optimizer) for c in _counters(part.optimizer)), default=0),
        "states": {k: _boxes_of(held, entries[id(held.parameter)]) for k, held in enumerate(_all_held(optimizer))},
    }


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Take over what `sharded_optimizer_state` led to."""
    for k, held in enumerate(_all_held(optimizer)):
        for name, values in held.states.items():
            for begin, box in state["states"][k][name].items():
                # The library fills the memory that it was given, though it promises only to answer with what it has read.
                values[begin : begin + box.numel()].copy_(box.flatten())
    for part in _parts(optimizer):
        _set_counters(part.optimizer, state["updates"])


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


def _parts(optimizer: Any) -> list[Any]:
    """Of dense parameters and of experts; without those of which this rank has none."""
    return [part for part in optimizer.chained_optimizers if part.optimizer is not None]


def _all_held(optimizer: Any) -> Iterator[_Held]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in _parts(optimizer):
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                held = part._get_model_param_range_map(parameter)["param"]
                group, place = part.model_param_group_index_map[parameter]
                main = inner.param_groups[group]["params"][place]
                yield _Held(parameter, held.start, held.end, _states(inner, main), replicated=False)
        else:
            groups = zip(
                getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True
            )
            parameter_of = {id(main): p for ps, mains in groups for p, main in zip(ps, mains, strict=True)}
            for main in (main for group in inner.param_groups for main in group["params"]):
                parameter = parameter_of.get(id(main), main)  # a float32 parameter is its own main parameter
                yield _Held(parameter, 0, main.numel(), _states(inner, main), replicated=True)


def _states(inner: Any, main: Tensor) -> dict[str, Tensor]:
    """The float32 parameter and AdamW's averages, flat; Megatron-Core's names."""
    states = {"param": main, **{name: inner.state[main][name] for name in ("exp_avg", "exp_avg_sq")}}
    return {name: state.detach().view(-1) for name, state in states.items()}


def _counters(inner: Any) -> Iterator[dict[str, Any]]:
    """Where AdamW counts its updates, as `step`: torch's by parameter, Transformer Engine's by group."""
    return (values for values in (*inner.param_groups, *inner.state.values()) if "step" in values)


def _set_counters(inner: Any, updates: int) -> None:
    for values in _counters(inner):
        values["step"] = torch.full_like(values["step"], updates) if isinstance(values["step"], Tensor) else updates


def _boxes_of(held: _Held, entry: Any) -> dict[str, dict[int, Any]]:
    """State → where it begins in the flat state → `ShardedTensor`, one for each box. entry: what the parameter is saved as."""
    found: dict[str, dict[int, Any]] = {name: {} for name in held.states}
    begin = 0
    for shard, first in _shards(entry):
        start, end = max(held.start, first), min(held.end, first + math.prod(shard.local_shape))
        for offset, sizes in boxes(shard.local_shape, start - first, end - first):
            for name, values in held.states.items():
                key = f"optimizer.state.{name}.{shard.key}"
                found[name][begin] = _sharded(key, values[begin:], shard, offset, sizes, replicated=held.replicated)
            begin += math.prod(sizes)
    assert begin == held.end - held.start, f"{entry.key}: {begin} elements of {held.end - held.start} are covered"
    return found


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
        assert shard.data.is_contiguous(), f"{shard.key} is not a range of its parameter"
        yield shard.without_data(), shard.data.storage_offset()


def _sharded(
    key: str, values: Tensor, shard: Any, offset: Sequence[int], sizes: Sequence[int], *, replicated: bool
) -> Any:
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


def _create_states(inner: Any) -> None:
    """Give AdamW its states, which it makes at its first step, so that there is something to load into or to save.

    A step at learning rate 0 over gradients of 0, which changes nothing but the counts of updates; they are set back.
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
