"""Rotary position embeddings (RoPE): the frequencies for every scaling type that the supported families use.

Sources: linear interpolation (arXiv 2306.15595), YaRN (arXiv 2309.00071, section 3), Llama 3.1's scaling by wavelength, dynamic NTK
scaling, which changes nothing up to the context length. The keys are those of `rope_parameters` in a Hugging Face config
(`rope_scaling` and `rope_theta` before transformers 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.config_class import rope_keys

if TYPE_CHECKING:
    from torch import Tensor

# kind → (required parameters, optional parameters)
_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}


_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number, neither NaN nor infinite, that a float can represent."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    theta             base of the frequencies
    kind, parameters  the scaling type and its settings
    fraction          of a head's dimensions, from the first, that is rotated
    longest           number of tokens beyond which the frequencies would depend on a text's length (dynamic scaling), else None
    ignored           keys that neither we nor `transformers` read for this scaling type
    """

    theta: float
    kind: str = "default"
    parameters: dict[str, float] = field(default_factory=dict)
    fraction: float = 1.0
    longest: int | None = None
    ignored: tuple[str, ...] = field(default=(), compare=False)

    @staticmethod
    def from_hf(given: dict[str, Any], *, theta: Any, max_positions: int, where: str, partial: bool = False) -> Rope:
        """Read one rope of a Hugging Face config. Raises CheckpointError naming the key that is missing, wrong or unsupported.

        given: `rope_parameters`, without which `theta` is the base. partial: whether the family may rotate a part of each head.
        """
        given = dict(given)
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        theta = given.pop("rope_theta", theta)
        fraction = given.pop("partial_rotary_factor", None)
        fraction = 1.0 if fraction is None else fraction
        if not is_finite_number(fraction) or not 0 < fraction <= 1:
            raise CheckpointError(
                f"{where}: partial_rotary_factor must be above 0 and at most 1; found {fraction!r:.80}."
            )
        if fraction != 1.0 and not partial:
            raise CheckpointError(
                f"{where}: a partial_rotary_factor other than 1 is not supported. Use a model without it."
            )
        if not isinstance(kind, str) or kind not in _PARAMETERS:
            raise CheckpointError(
                f"{where}: rope type {kind!r:.80} is not supported; supported are {', '.join(_PARAMETERS)}."
            )
        required, optional = _PARAMETERS[kind]
        unknown = sorted(set(given) - {*required, *optional})
        for key in unknown:
            if given.pop(key) is not None and key in rope_keys(kind):
                raise CheckpointError(
                    f"{where}: unsupported config key for rope type {kind}: {key}. Use a model without it."
                )
        given = {k: v for k, v in given.items() if v is not None}
        for key in required:
            if key not in given:
                raise CheckpointError(f"{where}: rope type {kind} needs {key}.")
        for key, value in {"rope_theta": theta, **given}.items():
            if not is_finite_number(value) and not (isinstance(value, bool) and key == "truncate"):
                raise CheckpointError(f"{where}: {key} must be a number; found {value!r:.80}.")
            if (key in _POSITIVE and value <= 0) or (key == "rope_theta" and value == 1):
                raise CheckpointError(f"{where}: {key} must be positive and, as a base, not 1; found {value!r:.80}.")
        if kind == "llama3" and given["low_freq_factor"] == given["high_freq_factor"]:
            raise CheckpointError(f"{where}: low_freq_factor and high_freq_factor must differ.")
        if "original_max_position_embeddings" in optional and kind != "dynamic":
            given.setdefault("original_max_position_embeddings", max_positions)
        longest = min(max_positions, int(given.get("original_max_position_embeddings", max_positions)))
        return Rope(
            float(theta), kind, given, float(fraction), longest if kind == "dynamic" else None, ignored=tuple(unknown)
        )

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` for a config."""
        partial = {"partial_rotary_factor": self.fraction} if self.fraction != 1.0 else {}
        return {"rope_type": self.kind, "rope_theta": self.theta, **self.parameters, **partial}

    def scaling_to_hf(self) -> dict[str, Any] | None:
        """`rope_scaling`, for transformers before 5."""
        return {"rope_type": self.kind, **self.parameters} if self.kind != "default" else None

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Rotation of each pair of rotated dimensions in radians per position: float32 [head_dim · fraction / 2]."""
        import torch  # here: configs are read, and layouts searched, without it

        rotated = int(head_dim * self.fraction)
        plain = 1.0 / (self.theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
        if self.kind == "linear":
            return plain / self.parameters["factor"]
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(rotated)
        return plain

    @property
    def attention_factor(self) -> float:
        """Factor by which queries and keys are each scaled after rotation (YaRN's temperature; 1 for other types)."""
        if self.kind != "yarn":
            return 1.0
        p = self.parameters
        if "attention_factor" in p:
            return float(p["attention_factor"])

        def temperature(scale: float) -> float:
            return 1.0 if p["factor"] <= 1 else 0.1 * scale * math.log(p["factor"]) + 1.0

        if p.get("mscale") and p.get("mscale_all_dim"):
            return temperature(p["mscale"]) / temperature(p["mscale_all_dim"])
        return temperature(1.0)

    def _llama3(self, plain: Tensor) -> Tensor:
        """Stretch long wavelengths by `factor`, keep short ones, interpolate in between."""
        p = self.parameters
        # Number of wavelengths in the original context.
        turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
        keep = ((turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])).clamp(0.0, 1.0)
        return (1 - keep) * plain / p["factor"] + keep * plain

    def _yarn(self, head_dim: int) -> Tensor:
        """Keep high-frequency dimensions, interpolate low-frequency ones, with a linear ramp in between."""
        import torch

        p = self.parameters

        def dimension(turns: float) -> float:
            wavelength = p["original_max_position_embeddings"] / (turns * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = dimension(p.get("beta_fast", 32)), dimension(p.get("beta_slow", 1))
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        interpolate = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
        wavelengths = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return interpolate / (p["factor"] * wavelengths) + (1 - interpolate) / wavelengths
