"""`Architecture`: a model's dimensions and options, read from a Hugging Face `config.json`. Unsupported options raise an error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.rope import Rope, is_finite_number
from megatron_iwsft.utils.json_files import read_json


@dataclass(frozen=True)
class Family:
    """What a model_type implies beyond the numbers in its config.

    class_name     class in transformers, for export
    qkv_bias       biases on the query, key and value projections
    qk_norm        RMSNorm of each head's query and key
    experts        mixture of experts in every layer
    window         sliding windows: "never", "always" (if sliding_window is set), or "by_layer" (with use_sliding_window)
    head_dim       default if the config does not set it; None means hidden_size / num_attention_heads
    kv_heads       default if the config does not set it; None means num_attention_heads
    sliding_window default if the config does not set it
    """

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    window: str = "never"
    head_dim: int | None = None
    kv_heads: int | None = None
    sliding_window: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", window="always", kv_heads=8, sliding_window=4096),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="by_layer", kv_heads=32, sliding_window=4096),
    "qwen3": Family(
        "Qwen3ForCausalLM", qk_norm=True, window="by_layer", head_dim=128, kv_heads=32, sliding_window=4096
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, experts=True, kv_heads=4),
}

# Keys that do not affect training.
_NEUTRAL = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label initializer_range
    is_decoder is_encoder_decoder label2id max_position_embeddings model_type num_labels output_attentions output_hidden_states
    output_router_logits pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef tie_word_embeddings torch_dtype
    transformers_version use_cache
    """.split()
)
_READ = frozenset(
    """
    attention_bias attention_dropout head_dim hidden_act hidden_size intermediate_size layer_types max_window_layers mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    use_sliding_window vocab_size
    """.split()
)
_READ_OF_EXPERTS = frozenset(
    """
    decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok num_local_experts
    """.split()
)

# The largest integers that a config may have: work and memory grow with them before any weight is read.
_LIMIT = 1 << 24
_LIMITS = {"num_hidden_layers": 2048, "num_experts": 2048, "num_local_experts": 2048, "sliding_window": 1 << 31}
_LIMITS |= {"max_position_embeddings": 1 << 31}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer. normalize: the probabilities of the chosen experts are rescaled to sum to 1."""

    count: int
    per_token: int
    ffn_size: int
    normalize: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder of a supported family: RMSNorm, SwiGLU, grouped-query attention, rotary positions.

    windows  per layer: how many tokens, itself included, a token attends to; None is full causal attention
    hf       the complete Hugging Face config, for export
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
    rope: Rope
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    experts: Experts | None
    tied: bool
    max_positions: int
    init_std: float
    hf: dict[str, Any]

    @staticmethod
    def from_hf(config: dict[str, Any], *, where: str) -> Architecture:
        """Read a Hugging Face config. Raises CheckpointError naming the key that is missing, wrong or unsupported."""
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} must be a JSON object; found {type(config).__name__}.")
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise CheckpointError(
                f"{where}: model_type {name!r:.80} is not supported; supported are {', '.join(FAMILIES)}."
            )
        family, keys = FAMILIES[name], _Keys(config, where)
        keys.refuse_unknown(_NEUTRAL | _READ | (_READ_OF_EXPERTS if family.experts else frozenset()), name)
        keys.refuse(config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r:.80}")
        keys.refuse(bool(config.get("mlp_bias")), "mlp_bias true")
        keys.refuse(bool(config.get("attention_bias")) and not family.qkv_bias, "attention_bias true")
        keys.refuse(bool(config.get("attention_dropout")), "attention_dropout above 0")

        heads, hidden, layers = (keys.count(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        groups = keys.count(
            "num_key_value_heads", default=heads if "num_key_value_heads" in config else family.kv_heads or heads
        )
        if heads % groups:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}."
            )
        implied = family.head_dim if "head_dim" not in config else None
        if config.get("head_dim") is None and implied is None and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not set."
            )
        max_positions = keys.count("max_position_embeddings", default=2048)
        arch = Architecture(
            family=name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_size=keys.count("intermediate_size"),
            num_heads=heads,
            num_groups=groups,
            head_dim=keys.count("head_dim", default=implied or hidden // heads),
            vocab_size=keys.count("vocab_size"),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope=Rope.from_hf(config, max_positions=max_positions, where=where),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            windows=keys.windows(family, layers),
            experts=keys.experts() if family.experts else None,
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=max_positions,
            init_std=keys.number("initializer_range", 0.02),
            hf=dict(config),
        )
        arch.hf.update(arch._written_out(family))
        return arch

    def _written_out(self, family: Family) -> dict[str, Any]:
        """Values that the config left to defaults, made explicit because defaults may differ between library versions."""
        for key in ("rope_theta", "rope_scaling"):
            self.hf.pop(key, None)
        return {
            "architectures": [family.class_name],
            "tie_word_embeddings": self.tied,
            "num_key_value_heads": self.num_groups,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_hf(),
            **({"head_dim": self.head_dim} if family.head_dim else {}),
            **({"sliding_window": self.windows[0]} if family.window == "always" else {}),
        }

    @staticmethod
    def from_directory(directory: str | Path) -> Architecture:
        """Read DIR/config.json."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} is not a Hugging Face model directory: it has no config.json.")
        config = read_json(path, dict[str, Any], CheckpointError, advice="Download or export the model again.")
        return Architecture.from_hf(config, where=str(path))

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding: padded to a multiple of 128, so equal for all tensor-parallel degrees that divide 128."""
        multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class _Keys:
    """Reads values from a config; every error names the file and the key."""

    config: dict[str, Any]
    where: str

    def refuse_unknown(self, known: frozenset[str], family: str) -> None:
        unknown = sorted(set(self.config) - known)
        if unknown:
            raise CheckpointError(
                f"{self.where}: unsupported config {'key' if len(unknown) == 1 else 'keys'} for {family}: {', '.join(unknown)}. "
                "Unknown keys are not ignored, because they may change the computation."
            )

    def refuse(self, condition: bool, what: str) -> None:
        if condition:
            raise CheckpointError(f"{self.where}: {what} is not supported.")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{self.where}: {key} must be a positive integer; found {value!r:.80}.")
        limit = _LIMITS.get(key, _LIMIT)
        if value > limit:
            raise CheckpointError(f"{self.where}: {key} must be at most {limit:,}; found {value!r:.80}.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if not is_finite_number(value):
            raise CheckpointError(f"{self.where}: {key} must be a number; found {value!r:.80}.")
        return float(value)

    def windows(self, family: Family, layers: int) -> tuple[int | None, ...]:
        """Each layer's sliding window."""
        given = self.config.get("sliding_window", family.sliding_window)
        if family.window == "always" and given is not None:
            return (self.count("sliding_window", default=family.sliding_window),) * layers
        wanted = bool(self.config.get("use_sliding_window"))
        self.refuse(wanted and family.window != "by_layer", "use_sliding_window true")
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = int(self.number("max_window_layers", 28)) if wanted and given is not None else layers
            kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise CheckpointError(f"{self.where}: layer_types must list {layers} layers; found {kinds!r:.200}.")
        for kind in kinds:
            self.refuse(kind not in ("full_attention", "sliding_attention"), f"layer type {kind!r:.80}")
        self.refuse("sliding_attention" in kinds and not wanted, "sliding_attention without use_sliding_window true")
        window = self.count("sliding_window", default=family.sliding_window) if "sliding_attention" in kinds else None
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def experts(self) -> Experts:
        self.refuse(self.config.get("decoder_sparse_step", 1) != 1, "decoder_sparse_step other than 1")
        self.refuse(bool(self.config.get("mlp_only_layers")), "mlp_only_layers")
        key = "num_local_experts" if "num_local_experts" in self.config else "num_experts"
        count, per_token = self.count(key), self.count("num_experts_per_tok")
        if per_token > count:
            raise CheckpointError(f"{self.where}: num_experts_per_tok {per_token} is above {key} {count}.")
        normalize = bool(self.config.get("norm_topk_prob", False))
        self.refuse(per_token == 1 and normalize, "norm_topk_prob true with num_experts_per_tok 1, a constant,")
        return Experts(count, per_token, self.count("moe_intermediate_size"), normalize)
