"""FLOPs of a model's matmuls, to compute model-FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_iwsft.hf.architecture import Architecture


def forward_flops(arch: Architecture, lengths: np.ndarray, trained: int) -> float:
    """FLOPs of one forward pass over trajectories of `lengths` tokens, 2 per multiply-add.

    Attention counts only the (query, key) pairs within a trajectory that the causal mask allows, the vocabulary projection only the
    `trained` positions, a mixture of experts only the chosen experts. Padding, norms, softmax and rotary embeddings are not counted.
    """
    lengths = np.asarray(lengths, np.float64)
    attention = arch.num_heads * arch.head_dim
    projections = arch.hidden_size * (2 * attention + 2 * arch.num_groups * arch.head_dim)
    if arch.experts is None:
        ffn = 3 * arch.hidden_size * arch.ffn_size
    else:
        chosen = 3 * arch.experts.ffn_size * arch.experts.per_token
        ffn = arch.hidden_size * (chosen + arch.experts.count)
    dense = arch.num_layers * (projections + ffn) * lengths.sum() + arch.hidden_size * arch.vocab_size * trained
    layers = Counter(arch.windows)
    scores = sum(2 * attention * count * _pairs(lengths, window) for window, count in layers.items())
    return float(2 * (dense + scores))


def training_flops(arch: Architecture, lengths: np.ndarray, trained: int) -> float:
    """FLOPs of forward and backward: 3 × forward (arXiv 2104.04473, appendix). Recomputation is not counted."""
    return 3 * forward_flops(arch, lengths, trained)


def _pairs(lengths: np.ndarray, window: int | None) -> float:
    """Number of (query, key) pairs: the sum over tokens of how many tokens, itself included, each attends to."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())
