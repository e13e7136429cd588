"""Reading values from a `config.json`: typed, within limits, and no key passed over that matters."""

from __future__ import annotations

from typing import Any

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.config_class import ConfigClass
from megatron_iwsft.hf.quantization import how_to_dequantise
from megatron_iwsft.hf.rope import is_finite_number

# Keys that a class reads, though no logit of a causal language model depends on them: what is returned beside the logits, how it is
# computed, the row of the embedding that gets no gradient (other trainers mask padding in the loss too), and other heads.
_NEUTRAL = frozenset(
    """
    _attn_implementation attn_implementation classifier_dropout hidden_dropout initializer_range max_position_embeddings num_labels
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp return_dict router_aux_loss_coef use_cache
    use_return_dict
    """.split()
)
# Keys that change every class's computation.
_OF_EVERY_CLASS = ("per_layer_config", "tie_word_embeddings")
# Keys that say where a config comes from. With those that a class declares, they are not worth a line in the log.
_ORIGIN = frozenset("_name_or_path auto_map model_type torch_dtype dtype transformers_version".split())
_OFF: tuple[Any, ...] = (None, False, 0, [], {}, "")

# The largest integers that a config may have: work and memory grow with them before any weight is read.
_LIMIT = 1 << 24
_LIMITS = {"num_hidden_layers": 2048, "num_experts": 2048, "num_local_experts": 2048, "sliding_window": 1 << 31}
_LIMITS |= {"max_position_embeddings": 1 << 31}


def limit_sizes(config: dict[str, Any], where: str) -> None:
    """Raise CheckpointError for a size or number of layers that is beyond all limits, in a config of any family or in its parts."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        waiting += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            limit = (
                _LIMITS.get(key, _LIMIT) if key in _LIMITS or key.startswith("num_") or key.endswith("_size") else None
            )
            if limit is not None and isinstance(value, int) and value > limit:
                raise CheckpointError(f"{where}: {key} must be at most {limit:,}; found {value!r:.80}.")


class Keys:
    """A config with its class's defaults filled in. Every error names the file and the key.

    `finish` then refuses what matters and was not read. where: the file, for messages.
    """

    def __init__(self, config: dict[str, Any], known: ConfigClass, where: str) -> None:
        self.config, self.where = config, where
        self._known, self._used = known, set(_ORIGIN)

    def use(self, *keys: str) -> None:
        """Count keys as read."""
        self._used.update(keys)

    def get(self, key: str, default: Any = None) -> Any:
        """The value in the config, else the class's default, else `default`."""
        self.use(key)
        return self.config.get(key, self._known.defaults.get(key, default))

    def refuse(self, condition: bool, what: str) -> None:
        if condition:
            raise CheckpointError(f"{self.where}: {what} is not supported. Use a model without it.")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where the value is null."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{self.where}: {key} must be a positive integer; found {value!r:.80}.")
        limit = _LIMITS.get(key, _LIMIT)
        if value > limit:
            raise CheckpointError(f"{self.where}: {key} must be at most {limit:,}; found {value!r:.80}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not is_finite_number(value):
            raise CheckpointError(f"{self.where}: {key} must be a number; found {value!r:.80}.")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; null is false."""
        value = self.get(key)
        if value not in (None, True, False):
            raise CheckpointError(f"{self.where}: {key} must be true or false; found {value!r:.80}.")
        return bool(value)

    def finish(self, model_type: str) -> tuple[str, ...]:
        """Refuse every key that changes the computation in the family's class and was not read, unless its value changes nothing.

        Returns the keys that neither we nor the class know, in order.
        """
        quantised = self.config.get("quantization_config") or self.config.get("compression_config")
        if quantised:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
            raise CheckpointError(
                f"{self.where}: quantised weights (quant_method {method!r:.80}) are not supported. {how_to_dequantise(quantised)}"
            )
        relevant = self._known.read | set(_OF_EVERY_CLASS)
        for key in sorted(relevant & (set(self.config) | set(self._known.defaults)) - self._used - _NEUTRAL):
            value = self.get(key)
            self.refuse(value not in _OFF, f"{key} {value!r:.80} for {model_type}")
        silent = self._used | _NEUTRAL | set(self._known.defaults) | self._known.read | self._known.common
        return tuple(sorted(set(self.config) - silent))

    def written_out(self) -> dict[str, Any]:
        """Defaults that were relied on. Written explicitly into exports: defaults differ between versions of `transformers`."""
        return {
            key: value
            for key, value in self._known.defaults.items()
            if key in self._used and key not in self.config and not key.startswith("default_")
        }
