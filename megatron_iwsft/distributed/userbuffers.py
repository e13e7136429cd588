"""Transformer Engine's userbuffers, through which tensor-parallel communication overlaps with matmuls. Not yet run on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_iwsft.errors import ConfigError


@cache
def start_userbuffers(tokens: int, hidden_size: int, *, tensor: int, fp8: bool, bf16: bool) -> None:
    """Allocate the buffers of this process, once: [tokens, hidden_size] in bf16, shared by `tensor` ranks of a node.

    fp8, bf16: what layers communicate in. Collective over all ranks. Raises ConfigError if the machine does not support it.
    """
    from transformer_engine.pytorch.module import base

    options: dict[str, Any] = dict(dtype=torch.bfloat16, bootstrap_backend="nccl")
    if hasattr(base, "UserBufferQuantizationMode"):  # Transformer Engine 2.7
        modes = base.UserBufferQuantizationMode
        options["quantization_modes"] = [*([modes.FP8] if fp8 else []), *([modes.NONE] if bf16 else [])]
    else:
        options["use_fp8"] = fp8
    try:
        base.initialize_ub([tokens, hidden_size], tensor, **options)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"parallel.overlap_tensor: Transformer Engine cannot make its buffers here: {error} Set it to false."
        ) from None
