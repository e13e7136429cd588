"""Low-rank adapters on Megatron-Core's linear layers, which are frozen: y + scale · B·(A·x) in place of y = W·x.

An adapter is a submodule of the layer it adapts, and a forward hook adds its output, so that both backends and every name stay as they
are. Megatron-Core has no adapters; those of Megatron-Bridge and NeMo wrap the layers.

How A [n·r, in] and B [rows, r] of the layer's n projections are sharded under tensor parallelism, and what is communicated:

  layer               A            B            forward               backward
  column-parallel     replicated   its rows     –                     all-reduce of du
    with sequence p.  replicated   its rows     all-gather of u       reduce-scatter of du
  row-parallel        its columns  replicated   all-reduce of u       –
    with sequence p.  its columns  replicated   reduce-scatter of u   all-gather of du
  experts             whole        whole        –                     –

u = A·x has n·r columns where x has thousands, so these messages are r/in of the layer's own. The dashes are where the algebra needs none:
every rank has all of x (column), or all of the gradient of y (row). The others could only be saved by joining the layer's own collective,
that is by taking that out of its matmul: no overlap with it any more, and for sequence parallelism x kept whole for backward.
Pipeline, context, expert and data parallelism need nothing here: adapters lie where their layers do, and gradients are summed over
data- and context-parallel ranks as any parameter's. With sequence parallelism the replicated matrix sees a rank's tokens only; marked
`sequence_parallel`, its gradient is summed over the tensor-parallel ranks at the end of the step, with that of the norms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.nn.functional import dropout, linear, one_hot

from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.hf.adapter_mapping import Stacked, adapted_rows, adapter_table
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.mapping import Fused, GateUp, Mapping, Replicated, Split, shapes
from megatron_iwsft.model.parameters import checkpoint_name, row_of

if TYPE_CHECKING:
    from megatron_iwsft.model.gpt import PolicyModel


class Adapters:
    """The adapters of one model chunk: whether they take part, and how they are saved. Made by `add_adapters`."""

    def __init__(self, model: PolicyModel, settings: AdapterSettings) -> None:
        self.settings, self.on = settings, True
        self._model = model

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model computes what its frozen weights alone compute."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def sharded_state(self) -> dict[str, Any]:
        """Megatron-Core's sharded state dict of the adapters, by parameter name. Not collective."""
        rows = {row.megatron: row for row in adapter_table(self._model.architecture, self.settings)}
        return {name: self._sharded(name, p, rows) for name, p in self._model.trained_parameters()}

    def _sharded(self, name: str, parameter: Tensor, rows: dict[str, Mapping]) -> Any:
        from megatron.core.dist_checkpointing import ShardedTensor
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

        groups, experts = self._model.pg_collection, self._model.architecture.experts
        key, expert = checkpoint_name(self._model, name)
        if expert is not None and experts is not None:
            at = (0, expert, experts.count)
            replica = (0, 0, groups.expt_dp.rank())
            return ShardedTensor.from_rank_offsets(key, parameter, at, replica_id=replica, prepend_axis_num=1)
        row = row_of(self._model, name, rows)
        assert row is not None
        layout, tp, dp = row[0].layout, groups.tp, groups.dp_cp.rank()
        if isinstance(layout, Replicated | Stacked):
            return ShardedTensor.from_rank_offsets(key, parameter, replica_id=(0, tp.rank(), dp))
        dim = layout.dim if isinstance(layout, Split) else 0
        shard = ShardedTensor.from_rank_offsets(key, parameter, (dim, tp.rank(), tp.size()), replica_id=(0, 0, dp))
        gated = isinstance(layout, GateUp) or (isinstance(layout, Fused) and isinstance(layout.parts, GateUp))
        return apply_swiglu_sharded_factory(shard, ()) if gated else shard


class LinearAdapter(torch.nn.Module):
    """The adapter of one layer, or of one expert's: adds scale · B·(A·x) to the layer's output.

    a, b: see the module's docstring.
    """

    _owns: Tensor | None  # [rows, n, 1]: 1 where a row is of a projection

    def __init__(
        self,
        weight: Tensor,
        settings: AdapterSettings,
        owns: Tensor | None,
        *,
        dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        row_parallel: bool,
        sequence_parallel: bool,
        dropout: float,
    ) -> None:
        """weight: the layer's, of this rank. owns: bool [rows, n], which of the n projections each row is of; None if there is one.
        group: over which the layer is split; None for an expert's.
        """
        super().__init__()
        self._group, self._row_parallel, self._sequence_parallel = group, row_parallel, sequence_parallel
        self._scale, self._dropout = settings.scale, dropout
        count = 1 if owns is None else owns.shape[1]
        new: Any = dict(dtype=dtype, device=weight.device)
        self.a = torch.nn.Parameter(torch.empty(count * settings.rank, weight.shape[1], **new))
        self.b = torch.nn.Parameter(torch.empty(weight.shape[0], settings.rank, **new))
        self.register_buffer("_owns", None if owns is None else owns.to(**new).unsqueeze(2), persistent=False)
        split, whole = (self.a, self.b) if row_parallel else (self.b, self.a)
        # Attributes of Megatron-Core's: what counts once in the gradient norm, and what is summed where.
        parameter: Any
        for parameter in (self.a, self.b):
            parameter.tensor_model_parallel = group is None or parameter is split
            parameter.sequence_parallel = sequence_parallel and group is not None and parameter is whole
            parameter.allreduce = group is not None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., rows] and x [..., in]: the layer's output and input, as it communicates them → y with the adapter added."""
        if self._dropout and self.training:
            with get_cuda_rng_tracker().fork(self._random_stream):
                x = dropout(x, self._dropout)
        u = self._exchange(linear(x, self.a)) * self._scale
        return torch.addmm(y.flatten(0, -2), u.flatten(0, -2), self._all_b.t()).view_as(y)

    @property
    def _all_b(self) -> Tensor:
        """B [rows, n·r]: 0 where a row and a column are of different projections."""
        return self.b if self._owns is None else (self._owns * self.b.unsqueeze(1)).flatten(1)

    def _exchange(self, u: Tensor) -> Tensor:
        if self._group is None or self._group.size() == 1:
            return u
        if self._row_parallel:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self._sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return reduce(u, group=self._group)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(u, group=self._group)
        return copy_to_tensor_model_parallel_region(u, group=self._group)

    @property
    def _random_stream(self) -> str:
        same_input = self._group is not None and not self._row_parallel and not self._sequence_parallel
        return _ALIKE if same_input else _OWN


class GroupedAdapter(torch.nn.ModuleList):
    """The adapters of the experts that Transformer Engine computes in one grouped matmul."""

    def forward(self, y: Tensor, x: Tensor, rows: list[int] | Tensor) -> Tensor:
        """y [n, out], x [n, in]: of all experts' tokens, one after the other; rows: how many each expert has."""
        sizes = rows.tolist() if isinstance(rows, Tensor) else rows
        parts = zip(self, y.split(sizes), x.split(sizes), strict=True)
        return torch.cat([adapter(y_of_one, x_of_one) for adapter, y_of_one, x_of_one in parts])


def add_adapters(
    chunks: list[PolicyModel],
    settings: AdapterSettings,
    parallel: ParallelContext,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freeze a model and add adapters, whose values are not initialised: see `parameters.load_adapters`. Not collective.

    To be called once the weights are loaded. dropout: of the adapters' inputs. seed: of dropout.
    """
    _start_random_streams(parallel, seed)
    for model in chunks:
        arch = model.architecture
        rows, all_shapes = {row.megatron: row for row in adapted_rows(arch, settings)}, shapes(arch)
        model.requires_grad_(False)
        adapters = Adapters(model, settings)
        for name, weight in list(model.named_parameters()):
            found = row_of(model, name, rows)
            if found is None:
                continue
            row, expert = found
            cut = (0, 1) if expert is not None else (parallel.tp.rank(), parallel.tp.size())
            adapter = LinearAdapter(
                weight,
                settings,
                _owns(row, all_shapes, *cut),
                dtype=model.config.params_dtype,
                group=None if expert is not None else parallel.tp,
                row_parallel=isinstance(row.layout, Split) and row.layout.dim == 1,
                sequence_parallel=model.config.sequence_parallel,
                dropout=dropout,
            )
            _attach(model, name, adapter, adapters)
        if model.pre_process and model.config.recompute_granularity is not None:
            # A recomputed part passes gradients to its parameters only if its input asks for one.
            model.embedding.register_forward_hook(_ask_for_gradient)
        model.adapters = adapters


def _attach(model: PolicyModel, name: str, adapter: LinearAdapter, adapters: Adapters) -> None:
    """To the layer of weight `name`: as `adapter`, or in a grouped layer of several weights as `adapter.0`, `adapter.1`, …"""
    layer, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(layer)
    if leaf != "weight":
        if hasattr(module, "adapter"):
            module.adapter.append(adapter)
            return
        module.adapter = GroupedAdapter([adapter])
    else:
        module.adapter = adapter
    if hasattr(module, "return_layernorm_output"):  # Transformer Engine's norm and projection in one
        module.return_layernorm_output = True

    def add(module: Any, arguments: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Tensor, Any]:
        (y, bias), (x, *rows) = output, arguments
        if isinstance(y, tuple):
            y, x = y
        return (module.adapter(y, x, *rows) if adapters.on else y), bias

    module.register_forward_hook(add)


def _owns(row: Mapping, all_shapes: dict[str, tuple[int, ...]], rank: int, size: int) -> Tensor | None:
    """bool [rows, n]: which of the projections `row.hf` each of a rank's rows of a fused weight belongs to; None if there is only one."""
    if len(row.hf) == 1:
        return None
    slices = row.slices(all_shapes, rank, size)
    parts = [torch.full((stop - start, 1), row.hf.index(name)) for name, (_, start, stop) in slices]
    return one_hot(row.layout.join(parts, rank, size).flatten(), len(row.hf)).bool()


def _ask_for_gradient(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


# Dropout draws from streams of Megatron-Core's tracker, which checkpoints and recomputation restore.
_OWN, _ALIKE = "adapters", "adapters, alike on tensor-parallel ranks"


def _start_random_streams(parallel: ParallelContext, seed: int) -> None:
    tracker = get_cuda_rng_tracker()
    place = [seed, parallel.dp_cp.rank(), parallel.pp.rank()]
    for name, ranks in ((_ALIKE, place), (_OWN, [*place, parallel.tp.rank()])):
        if name not in tracker.get_states():
            digest = hashlib.sha256(f"{name} {ranks}".encode()).digest()
            tracker.add(name, int.from_bytes(digest[:6], "little"))
