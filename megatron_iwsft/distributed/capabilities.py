"""Query what the GPU and NVIDIA's optional packages support on this machine, without initialising them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect

import torch

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe


def transformer_engine() -> tuple[str | None, str]:
    """(version, "") if Transformer Engine can be imported, else (None, reason)."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "missing"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken build raises anything
        return None, f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        return importlib.metadata.version("transformer-engine"), ""
    except importlib.metadata.PackageNotFoundError:
        return "version unknown", ""


def broken_transformer_engine() -> str | None:
    """What is wrong with an installed Transformer Engine that cannot be imported; None if it can, or is not installed."""
    version, why = transformer_engine()
    return None if version is not None or why == "missing" else why


def variable_length_attention() -> tuple[bool, str]:
    """(True, "") if torch has variable-length attention over packed rows on this GPU, else (False, reason)."""
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    try:
        from torch.nn.attention.varlen import varlen_attn

        has_windows = "window_size" in inspect.signature(varlen_attn).parameters
    except ImportError:
        has_windows = False
    if not has_windows:
        return False, f"torch {torch.__version__} has no variable-length attention with windows (2.11 or newer has)"
    if torch.cuda.get_device_capability() < (8, 0):
        return False, "variable-length attention needs Ampere or newer"
    return True, ""


def has_gradient_accumulation_fusion(device: torch.device) -> bool:
    """Whether the matmuls of layers in plain torch can accumulate weight gradients directly in float32 buffers.

    Transformer Engine's layers need nothing for it; Megatron-Core's own need the extension of NVIDIA's apex.
    """
    return device.type == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fp8_refusal(recipe: FP8Recipe, *, on_cpu: bool = False) -> str | None:
    """Why this machine (or a run on its CPU) cannot run an FP8 recipe, and what is needed; None if it can."""
    needs = FP8_RECIPES[recipe]
    if on_cpu:
        return f"needs a GPU ({needs.generation}), and this run is on the CPU"
    if not torch.cuda.is_available():
        return f"needs a GPU ({needs.generation}), and torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < needs.capability:
        return f"needs {needs.generation}; this is {torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    engine, why = transformer_engine()
    if engine is None:
        return f"needs Transformer Engine, which is {why}"
    return None
