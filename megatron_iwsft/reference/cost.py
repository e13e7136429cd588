"""What each kind of reference and proposal costs, in floating-point operations, memory and disk. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.memory import stage_parameters

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class ReferenceCost:
    """flops: over the whole run, as a share of training's own; memory: bytes on the fullest GPU; host: bytes of host memory behind
    it; disk: bytes.
    """

    kind: str
    flops: float
    memory: int
    host: int = 0
    disk: int = 0


def reference_costs(arch: Architecture, layout: ParallelLayout, *, tokens: int, epochs: int) -> list[ReferenceCost]:
    """For a corpus of `tokens` tokens, in bf16.

    A forward pass costs 2 operations a parameter and token, training 6 (arXiv 2001.08361, section 2.1); attention costs the same in
    both proportions, so shares hold with it.
    """
    copy = _BF16 * max(map(sum, stage_parameters(arch, layout)))
    forward = 1 / 3
    return [
        ReferenceCost("cached", flops=forward / epochs, memory=0, disk=_FP32 * tokens),
        ReferenceCost("live", flops=forward, memory=copy),
        ReferenceCost("live, offload", flops=forward, memory=copy, host=copy),
        ReferenceCost("live, refresh", flops=forward, memory=copy),
        ReferenceCost("proposal snapshot", flops=forward, memory=copy),
        ReferenceCost("proposal ema", flops=forward, memory=copy + copy * _FP32 // _BF16),
    ]
