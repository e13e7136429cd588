"""Query what the GPU and NVIDIA's optional packages support on this machine, without initialising them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import re

import torch

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe

# Transformer Engine's oldest supported version, the first that has every recipe, and the newest that tests have run with. The extra `gpu`
# of pyproject.toml and docs/gpu.md repeat them; tests/distributed/test_doctor.py compares.
OLDEST_TRANSFORMER_ENGINE, TESTED_TRANSFORMER_ENGINE = "2.3", "2.20"


def transformer_engine() -> tuple[str | None, str]:
    """(version, "") if a supported Transformer Engine can be imported, else (None, reason)."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, "missing"
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    if _release(version) < _release(OLDEST_TRANSFORMER_ENGINE):
        return None, f"too old: {version}; {OLDEST_TRANSFORMER_ENGINE} or newer is needed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken build raises anything
        return None, f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return version, ""


def broken_transformer_engine() -> str | None:
    """What is wrong with an installed Transformer Engine that cannot be used; None if it can, or is not installed."""
    version, why = transformer_engine()
    return None if version is not None or why == "missing" else why


def untested_transformer_engine() -> str | None:
    """What to say of a usable Transformer Engine that is newer than the tests' one; None if there is none."""
    version, _ = transformer_engine()
    if version is None or _release(version) <= _release(TESTED_TRANSFORMER_ENGINE):
        return None
    return f"newer than {TESTED_TRANSFORMER_ENGINE}, the newest that was tested"


def _release(version: str) -> tuple[int, int]:
    """(major, minor); a version that says neither counts as tested."""
    found = re.match(r"(\d+)\.(\d+)", version) or re.match(r"(\d+)\.(\d+)", TESTED_TRANSFORMER_ENGINE)
    assert found is not None
    return int(found[1]), int(found[2])


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
    return _engine_refusal(recipe)


def _engine_refusal(recipe: FP8Recipe) -> str | None:
    """What Transformer Engine says against a recipe on this GPU: it knows newer GPUs and what its CUDA lacks. None if it supports it."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # from where Megatron-Core takes it

    manager = FP8GlobalStateManager
    asked = {"blockwise": manager.is_fp8_block_scaling_available, "mxfp8": manager.is_mxfp8_available}
    available, why = asked.get(recipe, manager.is_fp8_available)()
    return None if available else f"is not supported here by Transformer Engine: {why.rstrip('.')}"
