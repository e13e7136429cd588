"""`Architecture`: what a Hugging Face `config.json` says, checked. Options that are not supported are refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import CheckpointError

# model_type → (class name for export, biases on the query, key and value projections)
FAMILIES = {"llama": ("LlamaForCausalLM", False), "qwen2": ("Qwen2ForCausalLM", True)}

# Keys that say nothing about the computation, or nothing that training uses.
_NEUTRAL = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "chunk_size_feed_forward",
        "problem_type",
        "num_labels",
    ]
)
_READ = frozenset(
    [
        "attention_bias",
        "attention_dropout",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "use_sliding_window",
        "vocab_size",
    ]
)


@dataclass(frozen=True)
class Architecture:
    """A decoder of a supported family: RMSNorm, SwiGLU, grouped-query attention, rotary positions.

    hf is the complete Hugging Face config, for export.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    tied: bool
    max_positions: int
    init_std: float
    hf: dict[str, Any]

    @staticmethod
    def from_hf(config: dict[str, Any], *, where: str) -> Architecture:
        """Read a Hugging Face config. Raises CheckpointError naming the key that is missing, wrong or unsupported."""
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} must hold a JSON object; it holds {type(config).__name__}.")
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(key) or {}, dict):
                raise CheckpointError(f"{where}: {key} must be an object; found {config[key]!r}.")
        family = config.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(
                f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}."
            )
        unknown = sorted(set(config) - _NEUTRAL - _READ)
        if unknown:
            raise CheckpointError(
                f"{where}: {', '.join(unknown)} is not a key that this program knows for {family}, and it ignores none."
            )

        def need(key: str) -> int:
            value = config.get(key)
            if type(value) is not int or value <= 0:
                raise CheckpointError(f"{where}: {key} must be a positive integer; found {value!r}.")
            return value

        def refuse(condition: bool, what: str) -> None:
            if condition:
                raise CheckpointError(f"{where}: {what} is not supported.")

        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        refuse(rope_type != "default", f"rope type {rope_type!r}")
        refuse(config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r}")
        refuse(bool(config.get("mlp_bias")), "mlp_bias true")
        refuse(bool(config.get("attention_bias")) and family == "llama", "attention_bias true")
        refuse(bool(config.get("use_sliding_window")), "use_sliding_window true")
        refuse(
            any(t != "full_attention" for t in config.get("layer_types") or []),
            "an attention other than full_attention",
        )
        refuse(bool(config.get("attention_dropout")), "attention_dropout above 0")

        def number(key: str, default: float) -> float:
            value = config.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"{where}: {key} must be a number; found {value!r}.")
            return float(value)

        heads, hidden = need("num_attention_heads"), need("hidden_size")
        groups = need("num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        if heads % groups:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}."
            )
        if not config.get("head_dim") and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim."
            )
        head_dim = need("head_dim") if config.get("head_dim") is not None else hidden // heads
        class_name, qkv_bias = FAMILIES[family]
        theta = float(rope["rope_theta"]) if "rope_theta" in rope else number("rope_theta", 10000.0)
        eps = number("rms_norm_eps", 1e-6)
        tied = bool(config.get("tie_word_embeddings", False))
        # Whatever was left to defaults is written out: those of another library version may differ.
        complete = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_parameters", "rope_scaling")} | {
            "architectures": [class_name],
            "tie_word_embeddings": tied,
            "num_key_value_heads": groups,
            "rms_norm_eps": eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
        return Architecture(
            family=family,
            num_layers=need("num_hidden_layers"),
            hidden_size=hidden,
            ffn_size=need("intermediate_size"),
            num_heads=heads,
            num_groups=groups,
            head_dim=head_dim,
            vocab_size=need("vocab_size"),
            norm_eps=eps,
            rope_theta=theta,
            qkv_bias=qkv_bias,
            tied=tied,
            max_positions=int(number("max_position_embeddings", 2048)),
            init_std=number("initializer_range", 0.02),
            hf=complete,
        )

    @staticmethod
    def from_directory(directory: str | Path) -> Architecture:
        """Read DIR/config.json."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} is not a Hugging Face model directory: it has no config.json.")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        return Architecture.from_hf(config, where=str(path))

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding: a multiple of 128, the same at every tensor-parallel degree that divides 128."""
        multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple
