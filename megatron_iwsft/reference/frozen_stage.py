"""A policy stage and the same stages of frozen models (reference, lagged proposal) in one pipeline pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.model.gpt import PolicyModel


class WithoutAdapters(torch.nn.Module):
    """A policy stage without its adapters, as a frozen model beside it: the same weights, and no memory of its own."""

    _model: tuple[PolicyModel]

    def __init__(self, model: PolicyModel) -> None:
        super().__init__()
        self._model = (model,)  # no submodule: what freezes this module must leave the adapters alone

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self._model[0].set_input_tensor(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (model,) = self._model
        assert model.adapters is not None
        with model.adapters.off():
            return model(*args, **kwargs)


class StageWithFrozenModels(torch.nn.Module):
    """A policy stage and frozen models' same stages (reference, lagged proposal), run in one pipeline pass.

    Between stages the k + 1 models' hidden states [T (/tp), 1, H] travel side by side as [T (/tp), k + 1, H]; the last stage
    returns log-probs [k + 1, T], policy first. `module` is the policy: Megatron-Core's schedules unwrap through it.
    `offload`: the frozen models' weights stay in pinned host memory. Each model's are copied, on a stream of their own, while the one
    before it computes, and are on the device only until its forward pass has ended.
    """

    def __init__(self, policy: torch.nn.Module, frozen: list[torch.nn.Module], *, offload: bool = False) -> None:
        super().__init__()
        self.module = policy
        self.frozen = torch.nn.ModuleList(model.requires_grad_(False).eval() for model in frozen)
        self.config = policy.config
        self._input: Tensor | None = None
        self._hosts = [_HostWeights(model) for model in frozen] if offload else [None] * len(frozen)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        (self._input,) = tensors

    def _hand_over(self, stage: Any, number: int) -> None:
        """Give a model its part of the input, right before it computes: models may share their modules."""
        part = None if self._input is None else self._input[:, number : number + 1]
        stage.set_input_tensor([None if part is None else (part.detach() if number else part).contiguous()])

    def set_is_first_microbatch(self) -> None:
        """Called by Megatron-Core's schedule if present; Transformer Engine then re-quantises FP8 weights."""
        for model in (self.module, *self.frozen):
            if hasattr(model, "set_is_first_microbatch"):
                model.set_is_first_microbatch()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        coming = [host for host in self._hosts if host is not None]
        _start_copying(coming)
        self._hand_over(self.module.module if hasattr(self.module, "module") else self.module, 0)
        outs = [self.module(*args, **kwargs)]
        with torch.no_grad():
            for number, (model, host) in enumerate(zip(self.frozen, self._hosts, strict=True), 1):
                with host or nullcontext():
                    _start_copying(coming)
                    self._hand_over(model, number)
                    outs.append(model(*args, **kwargs))
        self._input = None
        return torch.cat(outs, dim=0 if outs[0].dim() == 2 else 1)


def _start_copying(coming: list[_HostWeights]) -> None:
    """Start on the next model's weights, if there is one."""
    if coming:
        coming.pop(0).start_copying()


class _HostWeights:
    """Keeps a frozen module's weights on the host; within the context they are on their device. `start_copying` comes first."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._device = self._parameters[0].device
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._on_device: list[Tensor] = []
        for parameter in self._parameters:
            on_host = parameter.data.to("cpu")
            parameter.data = on_host.pin_memory() if self._device.type == "cuda" else on_host
        self._on_host: list[Tensor] = []

    def start_copying(self) -> None:
        """Neither the host nor what the device computes meanwhile waits for it."""
        self._on_host = [parameter.data for parameter in self._parameters]
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            self._on_device = [host.to(self._device, non_blocking=True, copy=True) for host in self._on_host]

    def __enter__(self) -> None:
        if self._stream is not None:
            computing = torch.cuda.current_stream()
            computing.wait_stream(self._stream)
            # They were allocated for the copying stream: not to be reused before this one has read them.
            for tensor in self._on_device:
                tensor.record_stream(computing)
        for parameter, tensor in zip(self._parameters, self._on_device, strict=True):
            parameter.data = tensor
        self._on_device = []

    def __exit__(self, *exception: object) -> None:
        for parameter, host in zip(self._parameters, self._on_host, strict=True):
            parameter.data = host
