"""Frozen copies of the policy that are updated from it every few steps: the lagged proposal, and a refreshed reference.

A copy is sharded like the model, has no gradients and no optimizer, and is part of every checkpoint; where adapters are trained, only they
are copied and saved. Memory: the parameters again, in
the run's dtype, and for an average of bfloat16 parameters a float32 one as well (bfloat16 would round its small updates away).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.model.gpt import PolicyModel


@dataclass
class LaggedCopy:
    """name: in checkpoints; chunks: this rank's model chunks; due: whether to update after a step, counted from 1.

    decay: the copy becomes decay · copy + (1 − decay) · policy; 0 makes it a snapshot.
    """

    name: str
    chunks: list[PolicyModel]
    due: Callable[[int], bool]
    decay: float = 0.0
    _averages: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            rounded = [(n, p) for n, p in chunk.trained_parameters() if p.dtype != torch.float32]
            self._averages.append({name: p.data.float() for name, p in rounded} if self.decay else {})

    @torch.no_grad()
    def after_step(self, step: int, policy: list[PolicyModel]) -> None:
        """Update from the policy's chunks, if it is due."""
        if not self.due(step):
            return
        for chunk, averages, newest in zip(self.chunks, self._averages, policy, strict=True):
            values = dict(newest.trained_parameters())
            for name, parameter in chunk.trained_parameters():
                average = averages.get(name, parameter.data)
                average.mul_(self.decay).add_(values[name].to(average), alpha=1.0 - self.decay)
                if name in averages:
                    parameter.data.copy_(average)

    def sharded_state(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Megatron-Core's sharded state dict: the averages under the parameters' keys, which begin with `name`."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        state: dict[str, Any] = {}
        for i, (chunk, averages) in enumerate(zip(self.chunks, self._averages, strict=True)):
            values = {name: averages.get(name, parameter.data) for name, parameter in chunk.trained_parameters()}
            saved: set[str] = set()
            for name, entry in chunk.sharded_state_dict(metadata=metadata).items():
                if name in values and isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    changes: dict[str, Any] = {"key": f"{self.name}.{entry.key}", "data": values[name]}
                    if isinstance(entry, ShardedTensor):
                        changes["dtype"] = values[name].dtype
                    state[f"{i}.{name}"] = replace(entry, **changes)
                    saved.add(name)
            assert saved == set(values), f"not in the sharded state: {sorted(set(values) - saved)}"
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a loaded `sharded_state`."""
        for i, (chunk, averages) in enumerate(zip(self.chunks, self._averages, strict=True)):
            for name, parameter in chunk.trained_parameters():
                if f"{i}.{name}" in state:
                    for target in (parameter.data, averages.get(name)):
                        if target is not None:
                            target.copy_(state[f"{i}.{name}"])
