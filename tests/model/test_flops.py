"""FLOP estimates against torch's FlopCounterMode on models of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.flops import _pairs, forward_flops, multiply_adds, training_flops
from tests.support import tiny


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text"])
def test_forward_and_training_flops_match_torchs_count(family: str) -> None:
    config = tiny.model_config(family, pad_token_id=0)
    arch, n = Architecture.from_hf(config, where="test"), 48
    fields = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, n, dtype=torch.long)).logits
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    # Eager attention computes, and torch counts, all n² pairs per layer; only n (n + 1) / 2 are not masked.
    masked = 4 * arch.num_layers * arch.num_heads * arch.head_dim * (n * n - n * (n + 1) / 2)
    lengths = np.array([n])
    assert forward_flops(arch, lengths, n) + masked == forward
    assert training_flops(arch, lengths, n) + 3 * masked == forward + counter.get_total_flops()


def test_no_flops_are_counted_for_attention_across_trajectories() -> None:
    arch = Architecture.from_hf(tiny.model_config(), where="test")
    apart = forward_flops(arch, np.array([30]), 10) + forward_flops(arch, np.array([18]), 5)
    assert forward_flops(arch, np.array([30, 18]), 15) == apart < forward_flops(arch, np.array([48]), 15)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 20])
def test_pairs_within_a_window(window: int | None) -> None:
    lengths = [1, 7, 8]
    expected = sum(min(i + 1, window or n) for n in lengths for i in range(n))
    assert _pairs(np.array(lengths), window).sum() == expected


def test_multiply_adds_are_exact_integers() -> None:
    """Ranks on different CPUs deal packs by them, and must agree."""
    arch = Architecture.from_hf(tiny.model_config(), where="test")
    lengths = np.array([5, 40, 131_072])
    found = multiply_adds(arch, lengths)
    assert found.dtype == np.int64
    assert 2.0 * found.sum() == forward_flops(arch, lengths, 0)
