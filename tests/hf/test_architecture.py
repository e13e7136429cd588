"""Configs as they are published load and mean what they mean in `transformers`; what is unsupported and matters is refused by name."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf import rope as positions
from megatron_iwsft.hf.architecture import FAMILIES, Architecture
from megatron_iwsft.hf.config_class import config_class, rope_keys
from megatron_iwsft.hf.mapping import shapes
from tests.support import tiny
from tests.support.published_configs import PUBLISHED


def read(config: dict[str, Any]) -> Architecture:
    return Architecture.from_hf(config, where="config.json")


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_means_what_it_means_in_transformers(model: str) -> None:
    from transformers import AutoConfig

    config, ignored = PUBLISHED[model]
    arch = read(config)
    assert set(arch.ignored) == ignored
    theirs = AutoConfig.for_model(**copy.deepcopy(config))  # it writes into what it is given
    assert arch.num_groups == theirs.num_key_value_heads
    assert arch.tied == theirs.tie_word_embeddings
    assert arch.norm_eps == theirs.rms_norm_eps
    window = theirs.sliding_window if arch.family != "llama" else None
    kinds = (
        getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * arch.num_layers
    )
    assert arch.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert_same_positions(arch, theirs)


def assert_same_positions(arch: Architecture, theirs: Any) -> None:
    family = FAMILIES[arch.family]
    folder = family.folder or arch.family
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    rotary = getattr(module, family.class_name.replace("ForCausalLM", "RotaryEmbedding"))(theirs)
    with_rope = getattr(theirs, "no_rope_layers", None) or [1] * arch.num_layers
    for layer, rope in enumerate(arch.ropes):
        assert (rope is not None) == bool(with_rope[layer])
        if rope is not None:
            kind = f"{theirs.layer_types[layer]}_" if hasattr(rotary, "full_attention_inv_freq") else ""
            expected = getattr(rotary, f"{kind}inv_freq")
            torch.testing.assert_close(rope.inverse_frequencies(arch.head_dim), expected, rtol=1e-5, atol=0)
            assert rope.attention_factor == pytest.approx(getattr(rotary, f"{kind}attention_scaling"))


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_tensors_are_those_of_the_class(model: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = PUBLISHED[model][0] | dict(num_hidden_layers=2, layer_types=None)
    if config["model_type"] == "qwen3_moe":
        pytest.skip(
            "transformers 5 holds experts in one tensor; the files have one per expert, as the round trips test"
        )
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    arch = read(config)
    if arch.tied:
        del expected["lm_head.weight"]
    assert shapes(arch) == expected


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_is_exported_means_the_same(model: str) -> None:
    arch = read(PUBLISHED[model][0])
    again = read(arch.hf)
    assert again == arch and again.hf == arch.hf


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases on all attention projections": (
        "llama",
        {"attention_bias": True},
        "attention_bias True for llama is not supported",
    ),
    "biases in the feed-forward layers": ("llama", {"mlp_bias": True}, "mlp_bias True for llama"),
    "dropout": ("qwen2", {"attention_dropout": 0.1}, r"attention_dropout 0\.1 for qwen2"),
    "Phi's dropout": ("phi3", {"resid_pdrop": 0.1}, r"resid_pdrop 0\.1 for phi3"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "soft-capped logits": (
        "gemma3_text",
        {"final_logit_softcapping": 30.0},
        r"final_logit_softcapping 30\.0 for gemma3_text",
    ),
    "soft-capped attention": ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0"),
    "attention in both directions": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention True",
    ),
    "layers that differ": (
        "llama",
        {"per_layer_config": {"0": {"hidden_act": "gelu"}}},
        "per_layer_config .* for llama",
    ),
    "a window of no token": ("mistral", {"sliding_window": 0}, "sliding_window 0, with which transformers fails"),
    "part of a head rotated": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    "Phi-4-mini's positions": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
        "rope type 'longrope' is not supported",
    ),
    "Phi's yarn, which is longrope": (
        "phi3",
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        "rope type 'yarn' is not",
    ),
    "yarn on some layers": (
        "smollm3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "yarn is not supported for smollm3",
    ),
    "some layers without experts": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
    "the first layer without experts": (
        "qwen3_moe",
        {"mlp_only_layers": [0]},
        r"mlp_only_layers \[0\] is not supported",
    ),
    "windows without a switch": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 4},
        "without use_sliding_window true",
    ),
    "too few layers with positions": (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers must be a 1 or 0 for each of 4 layers",
    ),
    "no layer with positions": ("smollm3", {"no_rope_layers": [0] * 4}, "no layer that has rotary positions"),
    "a flag that is text": (
        "llama",
        {"tie_word_embeddings": "no"},
        "tie_word_embeddings must be true or false; found 'no'",
    ),
    "FP8 weights": (
        "qwen3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        r"quantised weights \(quant_method 'fp8'\) .*FineGrainedFP8Config\(dequantize=True\).*save_pretrained\('OUT'\)",
    ),
    "4-bit weights": (
        "llama",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"quant_method 'bitsandbytes'.*\.dequantize\(\)\.save_pretrained",
    ),
    "GPTQ weights": (
        "qwen2",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quant_method 'gptq'.* download the model that these were made from\.$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_matters_and_is_unsupported_is_refused_by_name_and_value(case: str) -> None:
    family, changes, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        read(tiny.model_config(family) | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_a_class_reads_is_known_or_off_by_default(family: str) -> None:
    """Of the installed version: a new key that changes the class's computation by default fails here."""
    known = config_class(family, FAMILIES[family].folder or family)
    assert {"hidden_size", "num_hidden_layers", "rms_norm_eps"} <= known.read & set(known.defaults)
    assert read({"model_type": family}).ignored == ()


def test_keys_that_no_class_reads_are_named() -> None:
    arch = read(tiny.model_config(use_mrope=False, unk_token_id=0, bos_token_id=1, use_cache=False))
    assert (
        arch.ignored_keys
        == "Ignored keys of config.json, which Qwen2ForCausalLM does not read: unk_token_id, use_mrope."
    )
    assert read(tiny.model_config()).ignored_keys is None


def test_keys_of_positions_are_refused_only_if_transformers_reads_them(monkeypatch) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "new_key": 3}
    config = tiny.model_config("llama", rope_scaling=scaling)
    assert read(config).ignored == ("new_key",)
    monkeypatch.setattr(positions, "rope_keys", lambda kind: frozenset(["new_key"] if kind == "yarn" else []))
    with pytest.raises(CheckpointError, match="unsupported config key for rope type yarn: new_key"):
        read(config)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_every_key_of_positions_that_transformers_reads_is_known(kind: str) -> None:
    needed, optional = positions._PARAMETERS[kind]
    assert set(needed) <= rope_keys(kind) <= {"get", "partial_rotary_factor", "rope_theta", *needed, *optional}


def test_swish_is_silu() -> None:
    assert read(tiny.model_config("llama", hidden_act="swish")).activation == "silu"


def test_a_config_written_by_hand_has_no_unknown_keys_and_all_sizes() -> None:
    config = tiny.model_config(hidden_sizes=64)
    with pytest.raises(CheckpointError, match=r"model\.config: hidden_sizes: no such key of a qwen2 model"):
        Architecture.from_hf(config, where="model.config", by_hand=True)
    del config["hidden_size"], config["hidden_sizes"]
    with pytest.raises(CheckpointError, match=r"model\.config: hidden_size must be a positive integer; it is not set"):
        Architecture.from_hf(config, where="model.config", by_hand=True)


def test_a_multimodal_model_is_named_with_the_way_to_its_text_model() -> None:
    with pytest.raises(CheckpointError, match=r"model_type 'gemma3' has more than text.*Gemma3ForCausalLM as M"):
        read({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}})


def test_the_id_of_a_model_gets_the_command_that_downloads_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"hf download Qwen/Qwen2\.5-7B --local-dir models/Qwen2\.5-7B"):
        Architecture.from_directory("Qwen/Qwen2.5-7B")
    with pytest.raises(CheckpointError, match=r"^/nowhere/at/all does not exist\. Check the path\.$"):
        Architecture.from_directory("/nowhere/at/all")
    (tmp_path / "Qwen" / "Qwen2.5-7B").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        Architecture.from_directory("Qwen/Qwen2.5-7B")


def test_dynamic_scaling_is_limited_to_the_context_length() -> None:
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert read(tiny.model_config("llama", **scaling)).longest == 256
    assert read(tiny.model_config("llama")).longest is None
