"""Quantised checkpoints: what to tell a user who wants to train one."""

from __future__ import annotations

from typing import Any

# quant_method → (argument of `from_pretrained`, call on the model) with which `transformers` gives the weights in full precision, and
# the package that it needs for that
_DEQUANTISE = {
    "fp8": (", quantization_config=t.FineGrainedFP8Config(dequantize=True)", "", "accelerate"),
    "compressed-tensors": (
        ", quantization_config=t.CompressedTensorsConfig(dequantize=True)",
        "",
        "compressed-tensors",
    ),
    "bitsandbytes": ("", ".dequantize()", "bitsandbytes"),
}


def how_to_dequantise(quantization_config: Any = None) -> str:
    """The way out, in one sentence. quantization_config: of the config.json; None for FP8 weights without one."""
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else "fp8"
    if str(method) not in _DEQUANTISE:
        return "Training needs the unquantised weights: download the model that these were made from."
    argument, call, package = _DEQUANTISE[str(method)]
    return (
        "Training needs the unquantised weights: download the model that these were made from, or dequantise them once: "
        f"python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('IN', dtype='bfloat16'{argument}){call}"
        f".save_pretrained('OUT')\" (pip install {package}); the tokenizer's files have to be copied to OUT."
    )
