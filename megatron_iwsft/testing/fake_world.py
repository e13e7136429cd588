"""One rank of a world of thousands, in a process of its own: torch's `fake` process group, parameters without memory.

Process groups, model, buffers, optimizer and what each rank saves are made by the same code as in a real job; nothing is computed or
sent. `become` changes process-wide state, so it belongs in a process that does nothing else (`run_distributed(function, 1, …)`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_iwsft.checkpoint.optimizer_state import boxes_of
from megatron_iwsft.checkpoint.spread import spread_over_replicas
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.distributed.context import ParallelContext, Platform, stop
from megatron_iwsft.distributed.mcore_compat import OptimizerShard
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model
from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

META = torch.device("meta")

_DENSE = dict(rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu", tie_word_embeddings=False)
_LLAMA = dict(model_type="llama", num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)
# The shapes of published models, as config.json gives them.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen2.5-32B": _DENSE
    | dict(model_type="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40)
    | dict(num_key_value_heads=8, vocab_size=152064, max_position_embeddings=32768),
    "Llama-3.1-70B": _DENSE
    | _LLAMA
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "Llama-3.1-405B": _DENSE
    | _LLAMA
    | dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
    "Qwen3-235B-A22B": _DENSE
    | dict(model_type="qwen3_moe", hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, head_dim=128)
    | dict(num_attention_heads=64, num_key_value_heads=4, vocab_size=151936, max_position_embeddings=40960)
    | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, norm_topk_prob=True),
}
# How each is laid out on a thousand ranks; the rest is data parallel.
DEGREES: dict[str, dict[str, Any]] = {
    "Qwen2.5-32B": dict(tensor=8, sequence=True, pipeline=4, context=2),
    "Llama-3.1-70B": dict(tensor=8, sequence=True, pipeline=4, context=2),
    "Llama-3.1-405B": dict(tensor=8, sequence=True, pipeline=16, layers_per_stage=(7, *[8] * 14, 7)),
    "Qwen3-235B-A22B": dict(tensor=4, sequence=True, pipeline=2, context=2, expert=64),
}


def geometry(name: str, **changes: Any) -> Architecture:
    """The architecture of a published model, with some fields changed."""
    return Architecture.from_hf(GEOMETRIES[name] | changes, where=name)


@dataclass
class GroupCalls:
    """Calls of `new_group` by one rank: all of them, those for gloo, and the sizes of the groups that it is in."""

    calls: int = 0
    gloo: int = 0
    sizes: list[int] = field(default_factory=list)


def become(rank: int, world_size: int) -> tuple[Platform, GroupCalls]:
    """Make this process rank `rank` of `world_size`; its groups are counted from here on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_iwsft.distributed import cpu_backend

    if cpu_backend._CPU != META:
        cpu_backend._CPU = META
        torch.cuda.current_device = lambda: META  # type: ignore[assignment, return-value]
    stop()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dist.all_gather_object = torch.distributed.all_gather_object = _gather_own  # type: ignore[assignment]
    return Platform(META, rank, world_size), _count_groups(rank)


def _gather_own(found: list[Any], own: Any, group: Any = None) -> None:
    """What the fake group answers, without a copy for each of thousands of ranks."""
    found[:] = [own] * len(found)


_new_group: Callable[..., Any] = dist.new_group


def _count_groups(rank: int) -> GroupCalls:
    """Count calls of `new_group`, of which only groups with this rank are made."""
    counted = GroupCalls()

    def new_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
        counted.calls += 1
        counted.gloo += backend == "gloo"
        if rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        counted.sizes.append(len(ranks))
        return _new_group(ranks=ranks, backend="fake")

    dist.new_group = torch.distributed.new_group = new_group  # type: ignore[assignment]
    return counted


@dataclass(frozen=True)
class FakeRank:
    """A rank's model in bf16 and its distributed optimizer.

    chunks   the model's; `wrapped`: the same with gradient buffers
    """

    architecture: Architecture
    platform: Platform
    parallel: ParallelContext
    groups: GroupCalls
    chunks: list[PolicyModel]
    wrapped: list[Any]
    optimizer: Any

    @staticmethod
    def build(architecture: Architecture, layout: ParallelLayout, rank: int) -> FakeRank:
        platform, groups = become(rank, layout.world_size)
        parallel = platform.parallel(layout)
        with META:
            chunks = build_model(architecture, parallel, platform, ModelSettings(dtype=torch.bfloat16))
            wrapped = wrap_for_gradients(chunks, Optimizer())
            optimizer = build_optimizer(wrapped, Optimizer(), torch.bfloat16)
        return FakeRank(architecture, platform, parallel, groups, chunks, wrapped, optimizer)

    def bytes_held(self) -> tuple[int, int, int]:
        """Bytes of parameters, of gradients and of the optimizer's states on this rank, padding of buffers left out."""
        held = sum(p.numel() for chunk in self.chunks for p in chunk.parameters())
        optimized = sum(
            main.numel()
            for part in self.optimizer.chained_optimizers
            if part.optimizer is not None
            for group in part.optimizer.param_groups
            for main in group["params"]
        )
        return 2 * held, 4 * held, 12 * optimized

    def saved(self, data_rank: int | None = None, *, spread: bool = True) -> dict[str, Any]:
        """The sharded state dict of a save by this rank; or of the rank with another place among the data- and context-parallel ones.

        Of another rank it is derived: from the same model, and the ranges of the gradient buffers that are its own. It must hold the
        same experts. Without `spread`, the first of the ranks that hold the same weights writes them all.
        """
        if data_rank is None:
            state = TrainState(self.chunks, self.optimizer).sharded(random=False)
            self._share_out(state, spread)
            return state
        state = dict(self._model_state)
        models = {f"{part}.{name}": entry for part, entries in state.items() for name, entry in entries.items()}
        by_data = {id(entry.data): entry for entry in models.values() if torch.is_tensor(getattr(entry, "data", None))}
        experts_rank = self._experts_rank(data_rank)
        optimizer = [
            boxes_of(held, by_data[id(held.parameter)])
            for chunk in self.wrapped
            for buffers, part, parts in (
                (chunk.buffers, data_rank, self.parallel.dp_cp.size()),
                (chunk.expert_parallel_buffers, experts_rank, self._experts_ranks),
            )
            for held in _ranges(buffers, part, parts)
        ]
        for part, entries in state.items():
            state[part] = {
                name: replace(
                    entry, replica_id=(*entry.replica_id[:2], experts_rank if ".experts." in name else data_rank)
                )
                for name, entry in entries.items()
            }
        self._share_out(state, spread)
        return state | {"optimizer": dict(enumerate(optimizer))}

    @cached_property
    def _model_state(self) -> dict[str, Any]:
        return TrainState(self.chunks).sharded(random=False)

    def _share_out(self, state: dict[str, Any], spread: bool) -> None:
        from megatron.core.dist_checkpointing.mapping import apply_factories

        if spread:
            spread_over_replicas(state, self.parallel.layout)
        else:
            apply_factories(state)

    @property
    def _experts_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.parallel.layout.ranks_per_stage // self.parallel.layout.expert

    def _experts_rank(self, data_rank: int) -> int:
        """Which of those the rank at `data_rank` is. Experts are dealt to a stage's ranks in turn, tensor-parallel ones first."""
        layout = self.parallel.layout
        within = data_rank * layout.tensor + self.parallel.tp.rank()
        assert within % layout.expert == self.parallel.ep.rank(), "other experts"
        return within // layout.expert


def _ranges(buffers: list[Any], part: int, parts: int) -> Iterator[OptimizerShard]:
    """What the optimizer of one of `parts` ranks holds: an equal range of every bucket of the gradient buffers."""
    for buffer in buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // parts
            low = bucket.offset + part * share
            for parameter in bucket.params:
                begin, stop, _ = buffer.param_index_map[parameter]
                start, end = max(begin, low) - begin, min(stop, low + share) - begin
                if start < end:
                    main = torch.empty(end - start, device=META)
                    inner: Any = SimpleNamespace(state={main: {"exp_avg": main, "exp_avg_sq": main}})
                    yield OptimizerShard(parameter, start, end, main, inner, replicated=False)


def save_plan(state: dict[str, Any]) -> SavePlan:
    """torch's plan of what a rank writes of the tensors in a sharded state dict."""
    return SavePlan([_item(entry) for entry in written_tensors(state)])


def written_tensors(state: dict[str, Any]) -> list[Any]:
    """The `ShardedTensor`s that this rank writes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    return [v for v in nested_values(state) if isinstance(v, ShardedTensor) and is_main_replica(v.replica_id)]


def _item(entry: Any) -> WriteItem:
    offset = torch.Size(entry.global_offset)
    sizes = torch.Size((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
    data = TensorWriteData(
        ChunkStorageMetadata(offset, sizes), TensorProperties(dtype=entry.dtype), torch.Size(entry.global_shape)
    )
    return WriteItem(MetadataIndex(entry.key, offset), WriteItemType.SHARD, tensor_data=data)


def global_metadata(plans: list[SavePlan]) -> Metadata:
    """What `.metadata` says about the plans of all ranks. Raises ValueError unless they cover every tensor exactly once."""
    from torch.distributed.checkpoint import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, dedup_replicated_tensors=False)
    planner.set_up_planner({}, is_coordinator=True)
    return planner.create_global_plan(plans)[1]
