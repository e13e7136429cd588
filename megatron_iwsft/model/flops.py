"""FLOPs of a model's matmuls, to compute model-FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_iwsft.hf.architecture import Architecture

# TFLOP/s of dense bf16 matmuls, from the vendors' data sheets. The first name that a device's own name contains counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 311.9,
    "A800": 311.9,
    "L40S": 362.0,
}


def peak_tflops(device: str) -> float | None:
    """Of a GPU, by torch's name of it (`torch.cuda.get_device_name`): TFLOP/s in bf16, also of FP8 runs; None if it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)


def forward_flops(arch: Architecture, lengths: np.ndarray, trained: int) -> float:
    """FLOPs of one forward pass over trajectories of `lengths` tokens, 2 per multiply-add.

    Attention counts only the (query, key) pairs within a trajectory that the causal mask allows, the vocabulary projection only the
    `trained` positions, a mixture of experts only the chosen experts. Padding, norms, softmax and rotary embeddings are not counted.
    """
    return 2.0 * float(multiply_adds(arch, lengths).sum() + arch.hidden_size * arch.vocab_size * trained)


def multiply_adds(arch: Architecture, lengths: np.ndarray) -> np.ndarray:
    """Of the layers' forward pass over each trajectory, int64 [n], for lengths int [n] in tokens: see `forward_flops`."""
    lengths = np.asarray(lengths, np.int64)
    attention = arch.num_heads * arch.head_dim
    projections = arch.hidden_size * (2 * attention + 2 * arch.num_groups * arch.head_dim)
    if arch.experts is None:
        ffn = 3 * arch.hidden_size * arch.ffn_size
    else:
        chosen = 3 * arch.experts.ffn_size * arch.experts.per_token
        ffn = arch.hidden_size * (chosen + arch.experts.count)
    pairs = sum(layers * _pairs(lengths, window) for window, layers in Counter(arch.windows).items())
    return arch.num_layers * (projections + ffn) * lengths + 2 * attention * pairs


def training_flops(arch: Architecture, lengths: np.ndarray, trained: int, *, frozen: bool = False) -> float:
    """FLOPs of forward and backward. Recomputation is not counted. frozen: see `training_factor`."""
    return training_factor(frozen=frozen) * forward_flops(arch, lengths, trained)


def training_factor(*, frozen: bool) -> int:
    """FLOPs of forward and backward over those of forward (arXiv 2104.04473, appendix).

    frozen: adapters are trained and the weights have no gradients. What the adapters compute is not counted: a percent or so.
    """
    return 2 if frozen else 3


def _pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """(query, key) pairs of each trajectory: the sum over its tokens of how many tokens, itself included, each attends to."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return seen * (seen + 1) // 2 + (lengths - seen) * seen
