"""`Architecture`: a model's dimensions and options, read from a Hugging Face `config.json`. Unsupported options raise an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.config_class import DEFAULT_THETA, config_class
from megatron_iwsft.hf.config_keys import Keys
from megatron_iwsft.hf.rope import Rope
from megatron_iwsft.utils.hub import missing_directory
from megatron_iwsft.utils.json_files import read_json


@dataclass(frozen=True)
class Family:
    """What a model_type implies beyond the numbers in its config.

    class_name           class in transformers, for export
    folder               of transformers/models, if it is not the model_type
    qkv_bias             biases on the query, key and value projections
    qk_norm              RMSNorm of each head's query and key
    experts              mixture of experts in every layer
    windows              sliding windows: "never"; "always" in every layer if sliding_window is set; "switched" on in every layer by
                         use_sliding_window; "by_layer": layer_types, switched on by use_sliding_window, by default the layers from
                         max_window_layers on, or those without positions if there are any; "pattern": layer_types, by default all but
                         every sliding_window_pattern-th
    ropes                rotary positions: "one" for every layer; "some" layers have none (no_rope_layers); "by_window": another
                         base, and no scaling, for layers with a sliding window
    partial_rope         partial_rotary_factor rotates a part of each head; there are no scaling types
    post_norms           RMSNorm of the attention's and of the feed-forward's output too, before it is added to the residual
    zero_centered_norms  RMSNorm multiplies by 1 + weight
    scaled_embedding     embeddings are multiplied by √hidden_size
    query_scalar         attention is scaled by 1/√query_pre_attn_scalar, not 1/√head_dim
    fused_projections    one tensor for query, key and value, one for gate and up
    activation_key       name of the key for the feed-forward activation
    """

    class_name: str
    folder: str = ""
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    windows: Literal["never", "always", "switched", "by_layer", "pattern"] = "never"
    ropes: Literal["one", "some", "by_window"] = "one"
    partial_rope: bool = False
    post_norms: bool = False
    zero_centered_norms: bool = False
    scaled_embedding: bool = False
    query_scalar: bool = False
    fused_projections: bool = False
    activation_key: str = "hidden_act"


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", windows="always"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windows="by_layer"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, windows="by_layer"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True, experts=True, windows="switched"),
    "smollm3": Family("SmolLM3ForCausalLM", windows="by_layer", ropes="some"),
    "phi3": Family("Phi3ForCausalLM", windows="always", partial_rope=True, fused_projections=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        folder="gemma3",
        qk_norm=True,
        windows="pattern",
        ropes="by_window",
        post_norms=True,
        zero_centered_norms=True,
        scaled_embedding=True,
        query_scalar=True,
        activation_key="hidden_activation",
    ),
}

Activation = Literal["silu", "gelu_pytorch_tanh"]
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer. normalize: the probabilities of the chosen experts are rescaled to sum to 1."""

    count: int
    per_token: int
    ffn_size: int
    normalize: bool


@dataclass(frozen=True)
class Architecture:
    """A decoder of a supported family: RMSNorm, a gated feed-forward layer, grouped-query attention, rotary positions.

    ropes            per layer: its rotary positions; None is none
    attention_scale  of the products of queries and keys, without the ropes' own factor
    windows          per layer: how many tokens, itself included, a token attends to; None is full causal attention
    embedding_scale  by which embeddings are multiplied
    hf               the complete Hugging Face config, for export
    ignored          keys of the config that neither we nor the family's class in transformers know
    For the other options see `Family`.
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
    ropes: tuple[Rope | None, ...]
    attention_scale: float
    qkv_bias: bool
    qk_norm: bool
    post_norms: bool
    zero_centered_norms: bool
    fused_projections: bool
    activation: Activation
    embedding_scale: float
    windows: tuple[int | None, ...]
    experts: Experts | None
    tied: bool
    max_positions: int
    init_std: float
    hf: dict[str, Any]
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @staticmethod
    def from_hf(config: dict[str, Any], *, where: str, by_hand: bool = False) -> Architecture:
        """Read a Hugging Face config. Raises CheckpointError naming the key that is missing, wrong or unsupported.

        A key is supported; or refused, if it changes the computation in the family's own class of `transformers` and its value is not
        the neutral one; or ignored. Keys that are not set are what they are in that class.
        by_hand: written for this program, so that a key which nothing reads is a mistake, and sizes must be set.
        """
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} must be a JSON object; found {type(config).__name__}.")
        name, family = _family(config, where)
        keys = Keys(config, config_class(name, family.folder or name), where)
        missing = [key for key in _SIZES if key not in config] if by_hand else []
        if missing:
            raise CheckpointError(f"{where}: {missing[0]} must be a positive integer; it is not set.")
        heads, hidden, layers = (keys.count(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        groups = keys.count("num_key_value_heads", default=heads)
        if heads % groups:
            raise CheckpointError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}. "
                "Correct config.json, or download it again."
            )
        if keys.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not set. "
                "Correct config.json, or download it again."
            )
        head_dim = keys.count("head_dim", default=hidden // heads)
        max_positions = keys.count("max_position_embeddings", default=2048)
        with_rope = _layers_with_rope(keys, family, layers)
        kinds = _layer_kinds(keys, family, layers, with_rope)
        window = keys.count("sliding_window") if _SLIDING in kinds else None
        ropes = _ropes(keys, family, kinds, with_rope, max_positions)
        if any(int(head_dim * rope.fraction) % 2 for rope in ropes if rope is not None):
            raise CheckpointError(
                f"{where}: rotary positions need an even number of dimensions; head_dim is {head_dim}."
            )
        arch = Architecture(
            family=name,
            num_layers=layers,
            hidden_size=hidden,
            ffn_size=keys.count("intermediate_size"),
            num_heads=heads,
            num_groups=groups,
            head_dim=head_dim,
            vocab_size=keys.count("vocab_size"),
            norm_eps=keys.number("rms_norm_eps"),
            ropes=ropes,
            attention_scale=_attention_scale(keys, family, head_dim),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            zero_centered_norms=family.zero_centered_norms,
            fused_projections=family.fused_projections,
            activation=_activation(keys, family),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            windows=tuple(window if kind == _SLIDING else None for kind in kinds),
            experts=_experts(keys) if family.experts else None,
            tied=keys.flag("tie_word_embeddings"),
            max_positions=max_positions,
            init_std=keys.number("initializer_range", 0.02),
            hf=dict(config),
            ignored=tuple(sorted({*keys.finish(name), *(key for rope in ropes if rope for key in rope.ignored)})),
        )
        if by_hand and arch.ignored:
            raise CheckpointError(
                f"{where}: {', '.join(arch.ignored)}: no such key of a {name} model. Correct or remove it."
            )
        arch.hf.update(keys.written_out() | arch._written_out(family))
        return arch

    def _written_out(self, family: Family) -> dict[str, Any]:
        """What was derived, and the rotary positions under the names that transformers knows before and since version 5."""
        by_kind = dict(zip((_FULL if window is None else _SLIDING for window in self.windows), self.ropes, strict=True))
        nested = {kind: rope.to_hf() for kind, rope in by_kind.items() if rope is not None}
        by_window, local = family.ropes == "by_window", by_kind.get(_SLIDING)
        rope = (by_kind.get(_FULL) if by_window else None) or self.distinct_ropes[0]
        return {
            "architectures": [family.class_name],
            "num_key_value_heads": self.num_groups,
            "rope_parameters": nested if by_window else rope.to_hf(),
            "rope_theta": rope.theta,
            "rope_scaling": rope.scaling_to_hf(),
            **({"partial_rotary_factor": rope.fraction} if family.partial_rope else {}),
            **({"rope_local_base_freq": local.theta} if by_window and local is not None else {}),
        }

    @staticmethod
    def from_directory(directory: str | Path) -> Architecture:
        """Read DIR/config.json."""
        path = Path(directory) / "config.json"
        if not Path(directory).exists():
            raise CheckpointError(missing_directory(directory))
        if not path.is_file():
            raise CheckpointError(
                f"{directory} is not a Hugging Face model directory: it has no config.json. "
                "Give the directory that has one."
            )
        config = read_json(path, dict[str, Any], CheckpointError, advice="Download or export the model again.")
        return Architecture.from_hf(config, where=str(path))

    @property
    def ignored_keys(self) -> str | None:
        """A sentence for the log that names the keys that were ignored; None if there are none."""
        if not self.ignored:
            return None
        return f"Ignored keys of config.json, which {FAMILIES[self.family].class_name} does not read: {', '.join(self.ignored)}."

    @property
    def distinct_ropes(self) -> tuple[Rope, ...]:
        """The rotary positions that layers have, in the order of the first layer with each."""
        found: list[Rope] = []
        for rope in self.ropes:
            if rope is not None and rope not in found:
                found.append(rope)
        return tuple(found)

    @property
    def longest(self) -> int | None:
        """Tokens beyond which a trajectory's rotary positions would depend on its length; None if they never do."""
        return min((rope.longest for rope in self.distinct_ropes if rope.longest is not None), default=None)

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding: padded to a multiple of 128, so equal for all tensor-parallel degrees that divide 128."""
        multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


def _family(config: dict[str, Any], where: str) -> tuple[str, Family]:
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return name, FAMILIES[name]
    inner = config.get("text_config")
    text = inner.get("model_type") if isinstance(inner, dict) else None
    if isinstance(text, str) and text in FAMILIES:
        class_name = FAMILIES[text].class_name
        raise CheckpointError(
            f"{where}: model_type {name!r:.80} has more than text; its text model, {text}, is supported. Take it out once: python -c "
            f"\"from transformers import {class_name} as M; M.from_pretrained('IN', dtype='auto').save_pretrained('OUT')\"; the "
            "tokenizer's files have to be copied to OUT."
        )
    raise CheckpointError(f"{where}: model_type {name!r:.80} is not supported; supported are {', '.join(FAMILIES)}.")


def _attention_scale(keys: Keys, family: Family, head_dim: int) -> float:
    scalar = keys.number("query_pre_attn_scalar") if family.query_scalar else head_dim
    keys.refuse(scalar <= 0, f"query_pre_attn_scalar {scalar!r:.80}")
    return scalar**-0.5


def _activation(keys: Keys, family: Family) -> Activation:
    value = keys.get(family.activation_key)
    keys.refuse(value not in ("silu", "swish", "gelu_pytorch_tanh"), f"{family.activation_key} {value!r:.80}")
    return "gelu_pytorch_tanh" if value == "gelu_pytorch_tanh" else "silu"  # which swish is, too


def _layers_with_rope(keys: Keys, family: Family, layers: int) -> tuple[bool, ...]:
    if family.ropes != "some":
        return (True,) * layers
    given, interval = keys.get("no_rope_layers"), keys.count("no_rope_layer_interval")
    if given is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(given, list) or len(given) < layers or any(value not in (0, 1) for value in given):
        raise CheckpointError(
            f"{keys.where}: no_rope_layers must be a 1 or 0 for each of {layers} layers; found {given!r:.200}."
        )
    return tuple(bool(value) for value in given[:layers])


def _layer_kinds(keys: Keys, family: Family, layers: int, with_rope: tuple[bool, ...]) -> list[str]:
    """Each layer's attention: full, or with a sliding window."""
    if family.windows == "never":
        keys.refuse(bool(keys.config.get("use_sliding_window")), "use_sliding_window true")
        return [_FULL] * layers
    window = keys.get("sliding_window")
    if family.windows == "always":
        keys.refuse(window == 0, "sliding_window 0, with which transformers fails (full attention is null),")
        return [_FULL if window is None else _SLIDING] * layers
    switched = family.windows == "pattern" or keys.flag("use_sliding_window")
    if family.windows == "switched":
        keys.use(*(() if switched else ("max_window_layers",)))  # some versions start the windows at that layer
        return [_SLIDING if switched and window is not None else _FULL] * layers
    if family.windows == "pattern":
        every = keys.count("sliding_window_pattern", default=6)
        keys.use("_sliding_window_pattern")  # written by some versions beside layer_types, which they derived from it
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    elif family.ropes == "some":
        slides = [not rope for rope in with_rope]
    else:
        first = keys.number("max_window_layers", 28)
        slides = [layer >= first for layer in range(layers)]
    kinds = keys.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if switched and window is not None and slide else _FULL for slide in slides]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise CheckpointError(f"{keys.where}: layer_types must list {layers} layers; found {kinds!r:.200}.")
    for kind in kinds:
        keys.refuse(kind not in (_FULL, _SLIDING), f"layer type {kind!r:.80}")
    keys.refuse(_SLIDING in kinds and not switched, "sliding_attention without use_sliding_window true")
    return kinds


def _ropes(
    keys: Keys, family: Family, kinds: list[str], with_rope: tuple[bool, ...], max_positions: int
) -> tuple[Rope | None, ...]:
    """Each layer's rotary positions. `rope_scaling` has precedence over `rope_parameters`, as in transformers."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(keys.get(key) or {}, dict):
            raise CheckpointError(f"{keys.where}: {key} must be an object; found {keys.config[key]!r:.80}.")
    keys.use(DEFAULT_THETA)
    scaling, parameters = keys.get("rope_scaling") or {}, keys.get("rope_parameters") or {}
    fraction, original = keys.config.get("partial_rotary_factor"), keys.config.get("original_max_position_embeddings")
    keys.use("partial_rotary_factor", "original_max_position_embeddings")

    def rope(given: dict[str, Any], theta: Any) -> Rope:
        if not isinstance(given, dict):
            raise CheckpointError(f"{keys.where}: rope_parameters must be objects; found {given!r:.80}.")
        outer = {} if fraction is None else {"partial_rotary_factor": fraction}
        kind = given.get("rope_type", given.get("type", "default"))
        keys.refuse(family.partial_rope and kind != "default", f"rope type {kind!r:.80}")
        if original is not None and kind in ("llama3", "yarn"):
            given = given | {"original_max_position_embeddings": original}
        return Rope.from_hf(
            outer | given, theta=theta, max_positions=max_positions, where=keys.where, partial=family.partial_rope
        )

    if family.ropes == "by_window":
        by_kind = {
            _FULL: rope((parameters.get(_FULL) or {}) | scaling, _theta(keys, "rope_theta", "global")),
            _SLIDING: rope(parameters.get(_SLIDING) or {}, _theta(keys, "rope_local_base_freq", "local")),
        }
        ropes: tuple[Rope | None, ...] = tuple(by_kind[kind] for kind in kinds)
    else:
        one = rope(scaling or parameters, _theta(keys, "rope_theta"))
        ropes = tuple(one if has else None for has in with_rope)
    keys.refuse(not any(ropes), "no_rope_layers with no layer that has rotary positions")
    if len({1.0 if r is None else r.attention_factor for r in ropes}) > 1:
        raise CheckpointError(
            f"{keys.where}: rope type yarn is not supported for {keys.config['model_type']}, some of whose layers have other rotary "
            "positions: yarn scales their attention, and layers with different scales are not supported. "
            "Use a model with another rope type."
        )
    return ropes


def _theta(keys: Keys, key: str, kind: str | None = None) -> Any:
    """The base of the frequencies where the rope's own parameters have none."""
    default = keys.get(DEFAULT_THETA, 10000.0)
    value = keys.get(key)
    return value if value is not None else default[kind] if isinstance(default, dict) and kind else default


def _experts(keys: Keys) -> Experts:
    step, dense = keys.get("decoder_sparse_step"), keys.get("mlp_only_layers")
    keys.refuse(step != 1, f"decoder_sparse_step {step!r:.80}")
    keys.refuse(bool(dense), f"mlp_only_layers {dense!r:.80}")
    keys.use("num_experts", "num_local_experts")
    key = "num_local_experts" if "num_local_experts" in keys.config else "num_experts"
    count, per_token = keys.count(key), keys.count("num_experts_per_tok")
    if per_token > count:
        raise CheckpointError(
            f"{keys.where}: num_experts_per_tok {per_token} is above {key} {count}. "
            "Correct config.json, or download it again."
        )
    normalize = keys.flag("norm_topk_prob")
    keys.refuse(per_token == 1 and normalize, "norm_topk_prob true with num_experts_per_tok 1, a constant,")
    return Experts(count, per_token, keys.count("moe_intermediate_size"), normalize)
