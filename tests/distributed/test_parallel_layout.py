"""Parallel layouts: broken rules are named, estimates follow the formulas, parameter counts match built models."""

from __future__ import annotations

import pytest

from megatron_iwsft.distributed.parallel_layout import ParallelLayout, valid_layouts
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.memory import cost, stage_parameters
from megatron_iwsft.testing import run_distributed
from tests.support import tiny


def arch(**changes) -> Architecture:
    return Architecture.from_hf(tiny.model_config(**changes), where="test")


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (ParallelLayout(pipeline=3), "4 layers do not divide into 3 pipeline stages"),
        (ParallelLayout(pipeline=2, layers_per_stage=(2, 1, 1)), "layers_per_stage names 3 stages"),
        (
            ParallelLayout(pipeline=2, layers_per_stage=(2, 3)),
            "layers_per_stage adds up to 5 layers, but the model has 4; change its numbers",
        ),
        (ParallelLayout(tensor=3), "tensor 3 does not divide the model's 8 attention heads"),
        (ParallelLayout(tensor=4), "tensor 4 and the model's 6 key-value heads: one must divide the other"),
        (ParallelLayout(sequence=True), "sequence: true needs tensor ≥ 2; it is 1"),
        (ParallelLayout(data=2, expert=2), "expert 2, but the qwen2 family has no experts"),
    ],
)
def test_a_broken_rule_is_named(layout: ParallelLayout, rule: str) -> None:
    changes = dict(num_attention_heads=12, num_key_value_heads=6, head_dim=8) if "key-value" in rule else {}
    assert rule in str(layout.broken_rule(arch(**changes)))


MOE = dict(family="qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (ParallelLayout(data=3, expert=3), "expert 3 does not divide the model's 4 experts"),
        (ParallelLayout(pipeline=2, data=2, expert=4), "expert 4 does not divide the 2 ranks of a pipeline stage"),
        (ParallelLayout(tensor=2, expert=2), "a mixture of experts with tensor ≥ 2 needs `sequence: true`"),
    ],
)
def test_a_broken_rule_of_experts_is_named(layout: ParallelLayout, rule: str) -> None:
    assert rule in str(layout.broken_rule(arch(**MOE)))


def test_every_offered_layout_is_valid_and_uses_all_gpus() -> None:
    found = list(valid_layouts(arch(), 8))
    assert {(x.tensor, x.pipeline, x.context, x.data) for x in found} >= {
        (8, 1, 1, 1),
        (1, 4, 2, 1),
        (2, 2, 2, 1),
        (1, 1, 1, 8),
    }
    assert all(x.world_size == 8 and x.broken_rule(arch()) is None for x in found)


def test_cost_follows_the_published_formulas() -> None:
    a = arch(num_hidden_layers=8)
    step = dict(seq_length=1024, micro_batch_size=1, micro_batches=8)
    flat, deep = cost(a, ParallelLayout(), **step), cost(a, ParallelLayout(pipeline=4), **step)
    interleaved = cost(a, ParallelLayout(pipeline=4, virtual_pipeline=2), **step)
    assert flat.bubble == 0
    assert deep.bubble == pytest.approx(3 / (8 + 3))  # (p−1)/(m+p−1)
    assert interleaved.bubble == pytest.approx(3 / (2 * 8 + 3))
    assert deep.activations == flat.activations  # a quarter of the layers, four micro-batches in flight
    assert interleaved.activations == pytest.approx(flat.activations * (1 + 3 / 8))  # 1 + (p−1)/(p·v)
    assert cost(a, ParallelLayout(context=2, data=2), **step).optimizer * 4 == flat.optimizer
    assert cost(a, ParallelLayout(), **step, recompute="full").activations < flat.activations / 4


COUNTED = [
    ParallelLayout(data=2),
    ParallelLayout(tensor=2, sequence=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(data=2, expert=2),
]
GEMMA3 = dict(family="gemma3_text", head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True)
COUNTED_MODELS = {"untied": {}, "tied": dict(tie_word_embeddings=True), "experts": MOE, "norms after": GEMMA3}


def built_parameters(platform) -> dict[tuple[str, ParallelLayout], int]:
    from megatron_iwsft.model.gpt import ModelSettings, build_model

    out = {}
    for name, layout in counted():
        parallel = platform.parallel(layout)
        chunks = build_model(arch(**COUNTED_MODELS[name]), parallel, platform, ModelSettings())
        out[name, layout] = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    return out


def counted() -> list[tuple[str, ParallelLayout]]:
    return [(n, x) for n, c in COUNTED_MODELS.items() for x in COUNTED if x.broken_rule(arch(**c)) is None]


@pytest.mark.parallel
def test_parameter_counts_equal_those_of_built_models() -> None:
    built = run_distributed(built_parameters, 2)
    for name, layout in counted():
        counts = [sum(c) for c in stage_parameters(arch(**COUNTED_MODELS[name]), layout)]
        assert [b[name, layout] for b in built] == (counts * 2 if layout.pipeline == 1 else counts), (name, layout)
