"""Recomputation and settings that are passed on to Megatron-Core: they change what is kept and how, not the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.testing import run_distributed
from tests.model.test_memory import saved
from tests.support.jobs import result, run_each
from tests.support.transformer_engine import architecture, as_on_hopper, packed_row, te

pytestmark = pytest.mark.parallel

ROW = [40, 33, 55]  # tokens of its trajectories
# Name → (model, settings), and which of the plain model's saved bytes it keeps at most.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "core attention": ("dense", {"recompute": ("core_attn",)}, 0.95),
    "feed-forward": ("dense", {"recompute": ("mlp",)}, 0.9),
    "attention and feed-forward": ("dense", {"recompute": ("core_attn", "mlp")}, 0.8),
    "one layer": ("dense", {"recompute": "full", "recompute_layers": 1}, 0.75),
    "layers": ("dense", {"recompute": "full"}, 0.5),
    "mixture of experts": ("experts", {"recompute": ("moe",)}, 0.9),
    "gathered tokens": ("experts", {"megatron": {"moe_token_dispatcher_type": "allgather"}}, 1.5),
}


def gradients(platform: Any, family: str, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """(gradients of the summed log-probs in float32, bytes saved for backward)."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model, forward
    from megatron_iwsft.model.parameters import load_weights

    arch, parallel = architecture(family), platform.parallel()
    policy = build_model(arch, parallel, platform, ModelSettings(**settings))
    load_weights(policy, RandomInit(arch, 1), parallel)
    named = dict(policy[0].named_parameters())
    for parameter in named.values():  # to which Transformer Engine's matmuls add gradients of weights
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(parameter.shape), False
    outs: list[torch.Tensor] = []
    size = saved(lambda: outs.append(forward(policy[0], packed_row(ROW))), policy[0].parameters())
    outs[0].sum().backward()
    return {n: p.main_grad if p.grad_added_to_main_grad else p.grad for n, p in named.items()}, size


def compared(platform: Any, family: str, plain: dict[str, Any], settings: dict[str, Any]) -> tuple[float, int, int]:
    """(largest relative difference from the plain model's gradients, bytes that the plain model saves, bytes saved)."""
    (expected, all_bytes), (found, some_bytes) = (gradients(platform, family, options) for options in (plain, settings))
    apart = max(float((found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in expected.items())
    return apart, all_bytes, some_bytes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return run_each(compared, 1, {name: (family, {}, settings) for name, (family, settings, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_gradients_stay_what_they_are(name: str, outcomes: dict[str, Any]) -> None:
    apart, all_bytes, some_bytes = result(outcomes, name)
    assert apart <= 1e-6 and some_bytes <= CASES[name][2] * all_bytes


def bytes_forgotten(module: str) -> int:
    """Of Transformer Engine's layers in bf16, what recomputation of the module does not keep of `ROW`.

    layernorm  the norm before the router: its output of `hidden_size` in bf16, and its float32 scale. Its input, the residual, is kept
    moe_act    the activation's output, which is what the second projection of each chosen expert reads: `ffn_size` in bf16. Its input, the
               first projection's output, is kept
    """
    arch = architecture("experts")
    assert arch.experts is not None
    per_token = {"layernorm": 2 * arch.hidden_size + 4, "moe_act": 2 * arch.experts.per_token * arch.experts.ffn_size}
    return per_token[module] * arch.num_layers * sum(ROW)


def compared_with_te(platform: Any, module: str) -> tuple[float, int, int]:
    with as_on_hopper():
        options = dict(dtype=torch.bfloat16, backend="transformer_engine")
        return compared(platform, "experts", options, options | {"recompute": (module,)})


@te
@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
def test_what_needs_transformer_engine_keeps_less_there(module: str) -> None:
    ((apart, all_bytes, some_bytes),) = run_distributed(compared_with_te, 1, module)
    assert apart == 0 and all_bytes - some_bytes == bytes_forgotten(module)


def refusals(platform: Any) -> list[str]:
    said = []
    for module in ("moe_act", "layernorm"):
        try:
            gradients(platform, "experts", {"recompute": (module,)})
            said.append("accepted")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_what_megatron_core_does_not_support_is_one_sentence() -> None:
    ((by_megatron, by_us),) = run_distributed(refusals, 1)
    assert "does not support these settings" in by_megatron and "moe_act" in by_megatron
    assert "layernorm needs Transformer Engine" in by_us
