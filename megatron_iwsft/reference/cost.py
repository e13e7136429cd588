"""Estimated cost of each kind of reference and proposal: FLOPs, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.memory import stage_parameters

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class ReferenceCost:
    """flops: over the run, as a fraction of the training FLOPs; memory: bytes on the GPU with the most; host: bytes of host memory for
    that GPU; disk: bytes.
    """

    kind: str
    flops: float
    memory: int
    host: int = 0
    disk: int = 0


def reference_costs(
    arch: Architecture, layout: ParallelLayout, *, tokens: int, epochs: int, adapters: bool = False
) -> list[ReferenceCost]:
    """Costs for a corpus of `tokens` tokens, with weights in bf16.

    A forward pass takes 2 FLOPs per parameter and token, training takes 6 (arXiv 2001.08361, section 2.1). Attention has the same
    ratio, so the fractions hold with it. adapters: weights have no gradients, so that training takes 4; adapters' own parameters, less
    than a percent of a model's, are not counted.
    """
    copy = _BF16 * max(map(sum, stage_parameters(arch, layout)))
    forward = 1 / 2 if adapters else 1 / 3
    average = 0 if adapters else copy * _FP32 // _BF16
    return [
        ReferenceCost("cached", flops=forward / epochs, memory=0, disk=_FP32 * tokens),
        ReferenceCost("live", flops=forward, memory=copy),
        ReferenceCost("live, offload", flops=forward, memory=copy, host=copy),
        *([ReferenceCost("base", flops=forward, memory=0)] if adapters else []),
        *([] if adapters else [ReferenceCost("live, refresh", flops=forward, memory=copy)]),
        ReferenceCost("proposal snapshot", flops=forward, memory=copy),
        ReferenceCost("proposal ema", flops=forward, memory=copy + average),
    ]
