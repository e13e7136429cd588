"""The weights of a model in training, or its adapters, unsharded and under Hugging Face's names, on rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_iwsft.distributed.context import ParallelContext
from megatron_iwsft.hf.adapter_mapping import adapter_rows
from megatron_iwsft.hf.mapping import PerExpert, named_rows
from megatron_iwsft.model.gpt import PolicyModel
from megatron_iwsft.model.parameters import checkpoint_name

_Key = tuple[str, int | None]  # a parameter's name in checkpoints, and which expert's


class RunningWeights:
    """Sends a sharded model's tensors to rank 0 one by one, while the other ranks `serve` theirs in the same order.

    The constructor is collective over all ranks (they exchange which rank holds what, no tensors). Rank 0 then reads all of `names` in
    order; each costs one send per tensor-parallel shard or expert that another rank holds.
    """

    def __init__(self, chunks: list[PolicyModel], parallel: ParallelContext) -> None:
        self.architecture = chunks[0].architecture
        self._local: dict[_Key, Tensor] = {}
        for model in chunks:
            for name, parameter in model.trained_parameters():
                self._local[checkpoint_name(model, name)] = parameter.detach()
        adapters = chunks[0].adapters
        self._rows = dict(
            named_rows(self.architecture, tensor_parallel=parallel.tp.size())
            if adapters is None
            else adapter_rows(self.architecture, adapters.settings)
        )
        self.names = [hf for row in self._rows.values() for hf in row.hf]
        self._row_of = {hf: name for name, row in self._rows.items() for hf in row.hf}
        self._unread = list(self._rows)
        self._cached: tuple[str, list[Tensor]] | None = None
        # What a parameter consists of: tensor-parallel shards, or experts.
        self._pieces: dict[str, list[tuple[_Key, int]]] = {}
        for name, row in self._rows.items():
            if isinstance(row.layout, PerExpert):
                self._pieces[name] = [((name, expert), 0) for expert in range(row.layout.count)]
            else:
                self._pieces[name] = [((name, None), rank) for rank in range(parallel.tp.size())]

        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, (parallel.tp.rank(), {key: tuple(t.shape) for key, t in self._local.items()}))
        # piece → (first rank that holds it, shape)
        self._holders: dict[tuple[_Key, int], tuple[int, tuple[int, ...]]] = {}
        for rank, (tp_rank, shapes) in enumerate(held):
            for key, shape in shapes.items():
                self._holders.setdefault((key, tp_rank if key[1] is None else 0), (rank, shape))

    def read(self, name: str) -> Tensor:
        """A full tensor, on CPU. On rank 0, in the order of `names`."""
        key = self._row_of[name]
        row = self._rows[key]
        if self._cached is None or self._cached[0] != key:
            self._cached = None
            pieces = [self._receive(piece) for piece in self._pieces[key]]
            self._unread.remove(key)
            if isinstance(row.layout, PerExpert):
                full = torch.stack(pieces)
            else:
                full = pieces[0] if len(pieces) == 1 else row.layout.unshard(pieces)
            self._cached = key, row.layout.split(full)
        return self._cached[1][row.hf.index(name)]

    def discard_rest(self) -> None:
        """On rank 0, when it cannot write: receive what the others are going to send, so that they are not left waiting."""
        for key in self._unread:
            for piece in self._pieces[key]:
                self._receive(piece)

    def _receive(self, piece: tuple[_Key, int]) -> Tensor:
        holder, shape = self._holders[piece]
        if holder == dist.get_rank():
            return _plain(self._local[piece[0]]).cpu()
        any_local = next(iter(self._local.values()))
        shard = torch.empty(shape, dtype=any_local.dtype, device=any_local.device)
        dist.recv(shard, src=holder)
        return shard.cpu()

    def serve(self) -> None:
        """On every other rank: send this rank's pieces in the order in which rank 0 reads."""
        for pieces in self._pieces.values():
            for piece in pieces:
                if self._holders[piece][0] == dist.get_rank():
                    dist.send(_plain(self._local[piece[0]]).contiguous(), dst=0)


def _plain(parameter: Tensor) -> Tensor:
    """Dequantised, if it is stored in FP8."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
