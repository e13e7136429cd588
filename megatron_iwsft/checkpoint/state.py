"""`TrainState`: everything of a run that a checkpoint holds, as Megatron-Core's sharded state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from megatron_iwsft.distributed.mcore_compat import (
    random_states,
    set_parameters_from_main,
    set_random_states,
    unquantized_copy,
)
from megatron_iwsft.model.parameters import fill
from megatron_iwsft.reference.lagged_copy import LaggedCopy

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


_EXTRA_STATE = re.compile(r"_extra_state\d*$")  # numbered in a layer of several experts


class HostState(Protocol):
    """Small state kept on the host, the same on every rank, saved as JSON."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def _nothing() -> None:
    return None


class ScheduleState(Protocol):
    """The learning-rate schedule's part of a checkpoint, in plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """A run's state.

    policy     this rank's model chunks: `PolicyModel`s, or what has their `sharded_state_dict`
    optimizer, schedule  None for weights alone; the optimizer is Megatron-Core's
    lagged     copies that follow the policy
    frozen     name → chunks of models of which only delayed scaling's state is saved: it follows the steps, though the weights do not
    host       name → small state, such as the divergence monitor
    gather_parameters  completes an overlapped all-gather of parameters; called before they are saved or exported
    step       finished steps
    """

    policy: list[Any]
    optimizer: MegatronOptimizer | None = None
    schedule: ScheduleState | None = None
    lagged: Sequence[LaggedCopy] = ()
    frozen: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    host: dict[str, HostState] = field(default_factory=dict)
    gather_parameters: Callable[[], None] = _nothing
    step: int = 0

    def sharded(self, *, random: bool, stored: Container[str] | None = None) -> dict[str, Any]:
        """Megatron-Core's sharded state dict; with `random`, of this rank's random states too. Not collective.

        stored: for loading, the keys of everything that the checkpoint holds.
        """
        from megatron.core.dist_checkpointing import ShardedObject

        # One key per layer, so that any pipeline split and the exporter find it. Megatron-Core adds this layout's process groups.
        metadata: dict[str, Any] = {"non_homogeneous_layers": True}
        state: dict[str, Any] = {
            f"model{i}": _without_extra_states(chunk.sharded_state_dict(metadata=metadata), stored)
            for i, chunk in enumerate(self.policy)
        }
        for i, chunk in enumerate(self.policy if stored is not None else ()):
            for name, parameter in chunk.named_parameters():
                unquantized = unquantized_copy(parameter)
                if unquantized is not None:  # what is loaded must not be rounded to FP8 on its way
                    state[f"model{i}"][name].data = unquantized
        if self.optimizer is not None:
            # Chunks of an interleaved pipeline number their layers alike: the optimizer looks tensors up, not keys.
            models = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
            state["optimizer"] = sharded_optimizer_state(self.optimizer, models)
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        for copy in self.lagged:
            state[copy.name] = copy.sharded_state(metadata)
        for name, chunks in self.frozen.items():
            scaling = _scaling_states(name, chunks, metadata, stored)
            if scaling:
                state[f"{name}_scaling"] = scaling
        if random:
            state["random"] = ShardedObject("random", random_states(), (dist.get_world_size(),), (dist.get_rank(),))
        return state

    def load_sharded(self, state: dict[str, Any]) -> None:
        """Take over a loaded `sharded` state dict."""
        for i, chunk in enumerate(self.policy):
            chunk.load_state_dict(state[f"model{i}"], strict=False)
            for name, parameter in chunk.named_parameters():
                if name in state[f"model{i}"] and unquantized_copy(parameter) is not None:
                    fill(parameter, state[f"model{i}"][name])
        if self.optimizer is not None:
            load_optimizer_state(self.optimizer, state["optimizer"])
            # Saved parameters may have been rounded to FP8 of another recipe, or of other scales.
            set_parameters_from_main(self.optimizer)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        for copy in self.lagged:
            copy.load_state(state[copy.name])
        for name, chunks in self.frozen.items():
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(state.get(f"{name}_scaling", {}).get(i, {}), strict=False)
        if "random" in state:
            set_random_states(state["random"])

    def host_states(self) -> dict[str, Any]:
        """JSON values."""
        return {name: part.state() for name, part in self.host.items()}

    def load_host_states(self, states: dict[str, Any]) -> None:
        """States missing from the checkpoint are left unchanged."""
        for name, part in self.host.items():
            if name in states:
                part.load_state(states[name])


def _scaling_states(
    name: str, chunks: Sequence[Any], metadata: dict[str, Any], stored: Container[str] | None
) -> dict[int, dict[str, Any]]:
    """Chunk → its `_extra_state`s, under keys that begin with `name`; empty unless it scales by history."""
    found = {}
    for i, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=metadata).items()
        states = {k: replace(entry, key=f"{name}.{entry.key}") for k, entry in entries if _EXTRA_STATE.search(k)}
        if kept := _without_extra_states(states, stored):
            found[i] = kept
    return found


def _without_extra_states(state: dict[str, Any], stored: Container[str] | None) -> dict[str, Any]:
    """A model's sharded state without those `_extra_state`s of Transformer Engine that hold nothing, or that are not in `stored`.

    Only delayed scaling has any. The local backend neither writes nor asks for them.
    """

    def kept(name: str, entry: Any) -> bool:
        if _EXTRA_STATE.search(name) is None:
            return True
        if stored is not None:
            return entry.unique_key in stored
        return isinstance(entry.data, Tensor) and bool(entry.data.numel())

    return {name: entry for name, entry in state.items() if kept(name, entry)}
