"""Megatron-Core's optimizer, from the `optimizer` section of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_iwsft.config import schema as config
from megatron_iwsft.distributed.mcore_compat import checked, free_unquantized_copies, inner_optimizers
from megatron_iwsft.model.gpt import PolicyModel


def wrap_for_gradients(
    chunks: list[PolicyModel], settings: config.Optimizer, megatron: Mapping[str, Any] | None = None
) -> list[DistributedDataParallel]:
    """Give each model chunk float32 gradient buffers that are reduced over data-parallel ranks. Overlaps that are null are off: see
    `Optimizer.resolved`. megatron: settings that are passed on, by Megatron-Core's names.
    """
    ddp = checked(
        DistributedDataParallelConfig,
        more=megatron or {},
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bool(settings.overlap_grad_reduce),
        overlap_param_gather=bool(settings.overlap_param_gather),
        use_distributed_optimizer=settings.distributed,
        check_for_nan_in_grad=False,
        fp8_param_gather=chunks[0].config.fp8_param,
    )
    # Later interleaved chunks run backward while the first one's buckets still fill: one bucket each.
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if settings.overlap_grad_reduce:  # so that the schedule reduces only after the last micro-batch
        no_sync = [chunk.no_sync for chunk in wrapped]
        for chunk in wrapped:
            chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    chunks: list[DistributedDataParallel], settings: config.Optimizer, dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron-Core's AdamW over the wrapped chunks."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.distributed,
            overlap_param_gather=bool(settings.overlap_param_gather),
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    for chunk in chunks:
        free_unquantized_copies(chunk)
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:  # one pass over memory in place of some twelve
                group["fused"] = all(p.device.type in ("cpu", "cuda") for p in group["params"])
    return optimizer
