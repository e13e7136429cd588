"""Memory estimates: activations against what the real layers save for backward, and what the local backend needs besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.memory import cost, local_mask_bytes
from megatron_iwsft.testing import run_distributed
from tests.support import tiny
from tests.support.transformer_engine import as_on_hopper, packed_row, te

TOKENS = 512
SIZES = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192, norm_topk_prob=True)
MODELS = {
    "llama": ("llama", {}),
    "one group": ("llama", {"num_key_value_heads": 1}),
    "normalised queries and keys": ("qwen3", {}),
    "experts": ("qwen3_moe", EXPERTS),
    # GELU, norms after attention and feed-forward, and windows that cover the row.
    "gemma3": (
        "gemma3_text",
        {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32, "sliding_window": 1024},
    ),
}
ARCH = Architecture.from_hf(tiny.model_config(), where="test")  # 4 layers, 4 groups of 8
LONG = 131072


def arch_of(name: str, layers: int) -> Architecture:
    family, changes = MODELS[name]
    config = tiny.model_config(
        family, **{**SIZES, "num_hidden_layers": layers, "max_position_embeddings": TOKENS, **changes}
    )
    return Architecture.from_hf(config, where="test")


def saved(function: Callable[[], Any], others: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that `function` keeps for backward, except those of `others`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_of_a_row(platform: Any, name: str, layers: int, layout: ParallelLayout) -> int:
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.model.gpt import ModelSettings, build_model, forward
    from megatron_iwsft.model.parameters import load_weights

    arch, parallel = arch_of(name, layers), platform.parallel(layout)
    policy = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, backend="transformer_engine"))
    load_weights(policy, RandomInit(arch, 0), parallel)
    return saved(lambda: forward(policy[0], packed_row([TOKENS])), policy[0].parameters())


def bytes_of_a_layer(platform: Any, name: str, layout: ParallelLayout) -> float:
    """Of one token: what two more layers save, so that embedding, output layer and rotary angles do not count."""
    with as_on_hopper():
        few, more = (bytes_of_a_row(platform, name, layers, layout) for layers in (1, 3))
    return (more - few) / 2 / TOKENS


def estimate(name: str, layout: ParallelLayout) -> float:
    whole = cost(arch_of(name, 1), layout, seq_length=TOKENS, micro_batch_size=1, micro_batches=1)
    return whole.activations / TOKENS


@te
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_saves_what_is_estimated(name: str) -> None:
    (found,) = run_distributed(bytes_of_a_layer, 1, name, ParallelLayout())
    assert found == pytest.approx(estimate(name, ParallelLayout()), rel=0.02)


@te
def test_a_tensor_parallel_rank_saves_its_share() -> None:
    layout = ParallelLayout(tensor=2, sequence=True)
    for found in run_distributed(bytes_of_a_layer, 2, "llama", layout):
        assert found == pytest.approx(estimate("llama", layout), rel=0.02)


def bytes_of_the_feed_forward_part(platform: Any) -> float:
    """Of one token, beyond its input, in the local backend."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model

    policy = build_model(arch_of("llama", 1), platform.parallel(), platform, ModelSettings(torch.bfloat16))
    mlp = policy[0].decoder.layers[0].mlp
    x = torch.randn(TOKENS, 1, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    return saved(lambda: mlp(x), [x, *mlp.parameters()]) / TOKENS


@pytest.mark.parallel
def test_swiglu_keeps_gate_up_and_their_product() -> None:
    assert run_distributed(bytes_of_the_feed_forward_part, 1) == [2 * 3 * SIZES["intermediate_size"]]


def test_dense_masks_of_long_trajectories() -> None:
    assert local_mask_bytes(ARCH, ParallelLayout(context=8), LONG) == 2**30
    assert local_mask_bytes(ARCH, ParallelLayout(), LONG) == 0, "causal attention needs no mask"
    windows = Architecture.from_hf(tiny.model_config("mistral", sliding_window=64), where="test")
    assert local_mask_bytes(windows, ParallelLayout(), 1000) == 1000**2
    assert local_mask_bytes(windows, ParallelLayout(), 64) == 0, "the window covers the trajectory"


def test_whole_keys_and_values_are_counted() -> None:
    layout = ParallelLayout(context=4, tensor=2, sequence=True)
    sizes = [
        cost(ARCH, layout, seq_length=1024, micro_batch_size=1, micro_batches=1, local=local).activations
        for local in (False, True)
    ]
    own, bf16, groups = 1024 // 4, 2, 2  # groups of this tensor-parallel rank
    missing = 3 * own  # tokens of the other context-parallel ranks
    assert sizes[1] - sizes[0] == ARCH.num_layers * bf16 * 2 * groups * 8 * missing
