"""Adapters on Transformer Engine's layers, on a CPU: against the local backend's, the base alone, FP8 weights, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.model.memory import cost
from megatron_iwsft.testing import run_distributed
from tests.model.test_memory import TOKENS, arch_of, saved
from tests.model.test_transformer_engine import BACKENDS, assert_equal_steps, build, two_steps
from tests.support.adapters import TrainedAdapters
from tests.support.transformer_engine import FAMILIES, architecture, as_on_hopper, packed_row, te


def settings_of(family: str) -> AdapterSettings:
    targets = ["qkv", "proj", "experts"] if family == "experts" else None
    return AdapterSettings.of(architecture(family), rank=4, alpha=8.0, targets=targets)


def add(policy: list[Any], parallel: Any, settings: AdapterSettings) -> None:
    from megatron_iwsft.model.adapters import add_adapters
    from megatron_iwsft.model.parameters import load_adapters

    add_adapters(policy, settings, parallel)
    load_adapters(policy, settings, TrainedAdapters(policy[0].architecture, settings, 5), parallel)


def computed(platform: Any, family: str, recompute: str) -> list[tuple[Any, list[bool]]]:
    """Of each backend: `two_steps`; whether the base alone is as before, and the adapters do something."""
    from megatron_iwsft.model.gpt import forward

    found = []
    for backend in BACKENDS:
        with as_on_hopper():
            parallel = platform.parallel()
            policy = build(platform, family, parallel, backend=backend, recompute=recompute)
            with torch.no_grad():
                before = forward(policy[0], packed_row([20, 13, 31]))
                add(policy, parallel, settings_of(family))
                with_adapters = forward(policy[0], packed_row([20, 13, 31]))
                with policy[0].adapters.off():
                    without = forward(policy[0], packed_row([20, 13, 31]))
            steps = two_steps(platform, policy, parallel)
        found.append((steps, [torch.equal(before, without), not torch.equal(before, with_adapters)]))
    return found


@te
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_compute_the_same(family: str, recompute: str) -> None:
    (expected, of_local), (found, of_te) = run_distributed(computed, 1, family, recompute)[0]
    assert of_local == of_te == [True, True]
    assert_equal_steps(found, expected)


def on_fp8_weights(platform: Any) -> tuple[set[str], set[str], set[str]]:
    """Types of the frozen weights and of the adapters, and what the optimizer holds."""
    from megatron_iwsft.distributed.mcore_compat import optimizer_shards
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

    with as_on_hopper():
        parallel = platform.parallel()
        options = dict(fp8="tensorwise", fp8_parameters=True, backend="transformer_engine")
        policy = build(platform, "dense", parallel, **options)
        add(policy, parallel, settings_of("dense"))
        optimizer = build_optimizer(wrap_for_gradients(policy, Optimizer()), Optimizer(), torch.bfloat16)
        named = {id(p): name for name, p in policy[0].named_parameters()}
        held = {named[id(shard.parameter)] for shard in optimizer_shards(optimizer)}
    weights = {type(p).__name__ for n, p in policy[0].named_parameters() if n.endswith("linear_qkv.weight")}
    assert not any(p.requires_grad for n, p in policy[0].named_parameters() if ".adapter." not in n)
    return weights, {f"{p.dtype} {type(p).__name__}" for _, p in policy[0].trained_parameters()}, held


@te
def test_adapters_on_fp8_weights_are_in_bf16_and_all_that_is_trained() -> None:
    ((weights, adapters, held),) = run_distributed(on_fp8_weights, 1)
    assert weights == {"Float8Tensor"}
    assert adapters == {"torch.bfloat16 Parameter"}
    assert len(held) == 16 and all(".adapter." in name for name in held), "A and B of four layers, twice"


def bytes_of_a_layer(platform: Any, name: str, settings: AdapterSettings) -> float:
    """That a layer with adapters keeps per token: what two more layers save, so that the rest of the model does not count."""
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.model.gpt import ModelSettings, build_model, forward
    from megatron_iwsft.model.parameters import load_weights

    kept = []
    with as_on_hopper():
        for layers in (1, 3):
            arch, parallel = arch_of(name, layers), platform.parallel()
            policy = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, backend="transformer_engine"))
            load_weights(policy, RandomInit(arch, 0), parallel)
            add(policy, parallel, settings)
            kept.append(saved(lambda policy=policy: forward(policy[0], packed_row([TOKENS])), policy[0].parameters()))
    return (kept[1] - kept[0]) / 2 / TOKENS


@te
@pytest.mark.parametrize("name", ["llama", "normalised queries and keys"])
def test_a_layer_saves_what_is_estimated(name: str) -> None:
    arch = arch_of(name, 1)
    # Of low rank: B with zeros between projections, which is kept too, does not grow with the tokens.
    settings = AdapterSettings.of(arch, rank=4, alpha=8.0, targets=None)
    sizes = dict(seq_length=TOKENS, micro_batch_size=1, micro_batches=1)
    expected = cost(arch, ParallelLayout(), adapters=settings, **sizes).activations / TOKENS
    assert run_distributed(bytes_of_a_layer, 1, name, settings)[0] == pytest.approx(expected, rel=0.02)
