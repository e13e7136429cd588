"""Configs as they are published: dimensions and keys of real models' `config.json`, by the names of the models."""

from __future__ import annotations

from typing import Any

_TOKENS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1",
    "use_cache": True,
}


def _config(
    model_type: str, hidden: int, ffn: int, layers: int, heads: int, groups: int | None, vocabulary: int, **more: Any
) -> dict:
    sizes = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
    }
    kv = {} if groups is None else {"num_key_value_heads": groups}
    activation = {} if model_type == "gemma3_text" else {"hidden_act": "silu"}
    return sizes | kv | activation | _TOKENS | more


_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_SMOLLM2 = dict(
    attention_bias=False,
    initializer_range=0.041666666666666664,
    is_llama_config=True,
    max_position_embeddings=8192,
    mlp_bias=False,
    pad_token_id=2,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_interleaved=False,
    rope_scaling=None,
    rope_theta=100000,
    tie_word_embeddings=True,
)
_QWEN2 = dict(attention_dropout=0.0, max_position_embeddings=32768, rope_theta=1e6, use_sliding_window=False)
_QWEN3 = dict(
    attention_bias=False, attention_dropout=0.0, head_dim=128, max_position_embeddings=40960, rope_theta=1000000
)
_QWEN3 |= dict(rope_scaling=None, sliding_window=None, use_sliding_window=False)
_MOE = dict(decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128)
_MOE |= dict(num_experts_per_tok=8, output_router_logits=False, router_aux_loss_coef=0.001)
_PHI = dict(
    embd_pdrop=0.0, resid_pdrop=0.0, attention_bias=False, attention_dropout=0.0, rms_norm_eps=1e-5, rope_scaling=None
)
_GEMMA3 = dict(
    attention_bias=False,
    attention_dropout=0.0,
    attn_logit_softcapping=None,
    cache_implementation="hybrid",
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=32768,
    query_pre_attn_scalar=256,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
)
_THREE_OF_FOUR = [1, 1, 1, 0] * 9

# name → (config, keys that are ignored and named)
PUBLISHED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LLaMA-1-7B": (
        _config("llama", 4096, 11008, 32, 32, None, 32000, max_sequence_length=2048, pad_token_id=-1),
        {"max_sequence_length"},
    ),
    "Llama-2-7b-chat": (
        _config(
            "llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, pretraining_tp=1, rope_scaling=None
        ),
        set(),
    ),
    "vicuna-7b-v1.5-16k": (
        _config(
            "llama", 4096, 11008, 32, 32, 32, 32000, rope_scaling={"factor": 4.0, "type": "linear"}, pad_token_id=0
        ),
        set(),
    ),
    "a dynamically scaled Llama 2": (
        _config(
            "llama", 4096, 11008, 32, 32, 32, 32000, rope_scaling={"factor": 2.0, "type": "dynamic"}, unk_token_id=0
        ),
        {"unk_token_id"},
    ),
    "Llama-3.1-8B-Instruct": (
        _config(
            "llama",
            4096,
            14336,
            32,
            32,
            8,
            128256,
            attention_bias=False,
            mlp_bias=False,
            rope_scaling=_LLAMA3,
            rope_theta=500000.0,
            max_position_embeddings=131072,
            eos_token_id=[128001, 128008, 128009],
        ),
        set(),
    ),
    "Llama-3.2-1B": (
        _config(
            "llama",
            2048,
            8192,
            16,
            32,
            8,
            128256,
            head_dim=64,
            rope_scaling=_LLAMA3 | {"factor": 32.0},
            rope_theta=500000.0,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            unsloth_fixed=True,
        ),
        {"unsloth_fixed"},
    ),
    "Llama-3.1-8B saved by transformers 5": (
        _config(
            "llama",
            4096,
            14336,
            32,
            32,
            8,
            128256,
            dtype="bfloat16",
            rope_parameters=_LLAMA3 | {"rope_theta": 5e5},
            max_position_embeddings=131072,
            head_dim=128,
        ),
        set(),
    ),
    "SmolLM2-135M-Instruct": (
        _config(
            "llama",
            576,
            1536,
            30,
            9,
            3,
            49152,
            **_SMOLLM2,
            **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}}},
        ),
        {"is_llama_config", "rope_interleaved", "transformers.js_config"},
    ),
    "SmolLM2-1.7B, fine-tuned": (
        _config("llama", 2048, 8192, 24, 32, 32, 49152, **_SMOLLM2, head_dim=None, _attn_implementation_autoset=True),
        {"is_llama_config", "rope_interleaved", "_attn_implementation_autoset"},
    ),
    "Mistral-7B-v0.1": (
        _config(
            "mistral",
            4096,
            14336,
            32,
            32,
            8,
            32000,
            max_position_embeddings=32768,
            sliding_window=4096,
            rms_norm_eps=1e-5,
        ),
        set(),
    ),
    "Mistral-Nemo-Instruct-2407": (
        _config(
            "mistral",
            5120,
            14336,
            40,
            32,
            8,
            131072,
            head_dim=128,
            max_position_embeddings=1024000,
            rms_norm_eps=1e-5,
            rope_theta=1000000.0,
            sliding_window=None,
            attention_dropout=0.0,
            tie_word_embeddings=False,
        ),
        set(),
    ),
    "Qwen2-7B": (
        _config("qwen2", 3584, 18944, 28, 28, 4, 152064, **_QWEN2, max_window_layers=28, sliding_window=131072),
        set(),
    ),
    "Qwen2.5-0.5B": (
        _config(
            "qwen2",
            896,
            4864,
            24,
            14,
            2,
            151936,
            **_QWEN2,
            max_window_layers=24,
            sliding_window=32768,
            use_mrope=False,
            tie_word_embeddings=True,
        ),
        {"use_mrope"},
    ),
    "s1.1-32B": (
        _config(
            "qwen2",
            5120,
            27648,
            64,
            40,
            8,
            152064,
            **_QWEN2,
            max_window_layers=70,
            sliding_window=None,
            rope_scaling=None,
        ),
        set(),
    ),
    "Qwen2.5-7B-Instruct with YaRN": (
        _config(
            "qwen2",
            3584,
            18944,
            28,
            28,
            4,
            152064,
            **_QWEN2,
            rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        ),
        set(),
    ),
    "Qwen2.5-7B-Instruct-1M": (
        _config(
            "qwen2",
            3584,
            18944,
            28,
            28,
            4,
            152064,
            **_QWEN2 | dict(max_position_embeddings=1010000),
            dual_chunk_attention_config={
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
        ),
        {"dual_chunk_attention_config"},
    ),
    "R1-Distill-Qwen saved by transformers 5": (
        _config(
            "qwen2",
            1536,
            8960,
            28,
            12,
            2,
            151936,
            max_position_embeddings=131072,
            use_sliding_window=False,
            use_mrope=False,
            layer_types=["full_attention"] * 28,
            rope_parameters={"rope_theta": 10000, "rope_type": "default"},
            sliding_window=None,
        ),
        {"use_mrope"},
    ),
    "Qwen2, last layers windowed": (
        _config(
            "qwen2",
            896,
            4864,
            24,
            14,
            2,
            151936,
            **_QWEN2 | dict(use_sliding_window=True),
            sliding_window=4096,
            max_window_layers=21,
        ),
        set(),
    ),
    "Qwen3-8B": (_config("qwen3", 4096, 12288, 36, 32, 8, 151936, **_QWEN3, max_window_layers=36), set()),
    "DeepSeek-R1-0528-Qwen3-8B": (
        _config(
            "qwen3",
            4096,
            12288,
            36,
            32,
            8,
            151936,
            **_QWEN3
            | {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "attn_factor": 0.8782488562869419,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "rope_type": "yarn",
                },
            },
            max_window_layers=36,
        ),
        {"attn_factor"},
    ),
    "Yarn-Llama-2-7b-64k": (
        _config(
            "llama",
            4096,
            11008,
            32,
            32,
            32,
            32000,
            max_position_embeddings=65536,
            pad_token_id=0,
            pretraining_tp=1,
            rms_norm_eps=1e-5,
            rope_scaling={
                "factor": 16.0,
                "finetuned": True,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            tie_word_embeddings=False,
        ),
        {"finetuned"},
    ),
    "Qwen3-4B with YaRN": (
        _config(
            "qwen3",
            2560,
            9728,
            36,
            32,
            8,
            151936,
            **_QWEN3
            | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        ),
        set(),
    ),
    "Qwen3-30B-A3B": (
        _config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, **_QWEN3, **_MOE, max_window_layers=48),
        set(),
    ),
    "Qwen3-Coder-30B-A3B": (
        _config(
            "qwen3_moe",
            2048,
            5472,
            48,
            32,
            4,
            151936,
            **_QWEN3,
            **_MOE,
            qkv_bias=False,
            shared_expert_intermediate_size=0,
            use_qk_norm=True,
        ),
        {"qkv_bias", "shared_expert_intermediate_size", "use_qk_norm"},
    ),
    "SmolLM3-3B": (
        _config(
            "smollm3",
            2048,
            11008,
            36,
            16,
            4,
            128256,
            attention_bias=False,
            attention_dropout=0.0,
            max_position_embeddings=65536,
            max_window_layers=28,
            mlp_bias=False,
            no_rope_layer_interval=4,
            no_rope_layers=_THREE_OF_FOUR,
            pad_token_id=128004,
            layer_types=["full_attention"] * 36,
            pretraining_tp=2,
            rope_scaling=None,
            rope_theta=5000000.0,
            sliding_window=None,
            use_sliding_window=False,
        ),
        {"max_window_layers"},
    ),
    "phi-4": (
        _config(
            "phi3",
            5120,
            17920,
            40,
            40,
            10,
            100352,
            **_PHI,
            max_position_embeddings=16384,
            rope_theta=250000,
            sliding_window=None,
            original_max_position_embeddings=16384,
            pad_token_id=100349,
            tie_word_embeddings=False,
        ),
        {"attention_bias"},
    ),
    "Phi-3-mini-4k-instruct": (
        _config(
            "phi3",
            3072,
            8192,
            32,
            32,
            32,
            32064,
            **_PHI,
            max_position_embeddings=4096,
            rope_theta=10000.0,
            sliding_window=2047,
            original_max_position_embeddings=4096,
            pad_token_id=32000,
            auto_map={
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
        ),
        {"attention_bias"},
    ),
    "gemma-3-1b-it": (
        _config("gemma3_text", 1152, 6912, 26, 4, 1, 262144, **_GEMMA3, sliding_window_pattern=6, pad_token_id=0),
        {"cache_implementation"},
    ),
    "gemma-3-270m": (
        _config(
            "gemma3_text",
            640,
            2048,
            18,
            4,
            1,
            262144,
            **_GEMMA3,
            _sliding_window_pattern=6,
            pad_token_id=0,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
            use_bidirectional_attention=False,
        ),
        {"cache_implementation"},
    ),
    "the text of gemma-3-4b-it": (
        {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        set(),
    ),
}
