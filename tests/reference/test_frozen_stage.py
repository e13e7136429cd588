"""Frozen models whose weights stay on the host: when they are copied, and that outputs do not change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_iwsft.reference import frozen_stage
from megatron_iwsft.reference.frozen_stage import StageWithFrozenModels


class Stage(torch.nn.Module):
    """Scales its input, and writes down when it computes."""

    def __init__(self, name: str, scale: float, log: list[str]) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.name, self.log, self.config = name, log, SimpleNamespace()

    def set_input_tensor(self, tensors: list[None]) -> None:
        assert tensors == [None], "the only stage"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(f"{self.name} computes")
        return x * self.scale


def stage(log: list[str], *, offload: bool) -> StageWithFrozenModels:
    policy, *frozen = (
        Stage(name, scale, log) for name, scale in (("policy", 1.0), ("reference", 2.0), ("proposal", 3.0))
    )
    return StageWithFrozenModels(policy, frozen, offload=offload)


def test_weights_are_copied_while_the_model_before_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    real = frozen_stage._HostWeights.start_copying

    def start_copying(host) -> None:
        log.append("copy")
        real(host)

    monkeypatch.setattr(frozen_stage._HostWeights, "start_copying", start_copying)
    offloaded = stage(log, offload=True)
    for _ in range(2):
        log.clear()
        out = offloaded(torch.ones(1, 4))
        assert log == ["copy", "policy computes", "copy", "reference computes", "proposal computes"]
        assert torch.equal(out, stage([], offload=False)(torch.ones(1, 4)))


def test_weights_are_on_the_device_only_during_their_forward_pass() -> None:
    offloaded = stage([], offload=True)
    before = [p.data.data_ptr() for p in offloaded.frozen.parameters()]
    offloaded(torch.ones(1, 4))
    assert [p.data.data_ptr() for p in offloaded.frozen.parameters()] == before
    assert all(not host._on_device for host in offloaded._hosts)
