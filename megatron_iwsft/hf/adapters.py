"""Which projections of a model have low-rank adapters, and of what size. Pure arithmetic.

An adapter of rank r adds scale · B·A to a projection's weight [out, in]: A [r, in] random, B [out, r] zero at first (arXiv 2106.09685).
Projections are those of the Hugging Face model, so that an adapter is the same as PEFT's: Megatron's fused `linear_qkv` holds three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.architecture import Architecture

Target = Literal["qkv", "proj", "fc1", "fc2", "experts"]

# Target → the adapted layers, by their names in checkpoints.
LAYERS: dict[Target, tuple[str, ...]] = {
    "qkv": ("self_attention.linear_qkv",),
    "proj": ("self_attention.linear_proj",),
    "fc1": ("mlp.linear_fc1",),
    "fc2": ("mlp.linear_fc2",),
    "experts": ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"),
}


def available(arch: Architecture) -> tuple[Target, ...]:
    """The targets that a model has."""
    return ("qkv", "proj", "experts") if arch.experts else ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapters of one model. scale = alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[Target, ...]

    @staticmethod
    def of(arch: Architecture, *, rank: int, alpha: float, targets: Sequence[Target] | None) -> AdapterSettings:
        """targets None: every projection, except those of experts. Raises ConfigError for what the model does not have."""
        has = available(arch)
        missing = next((target for target in targets or () if target not in has), None)
        if missing is not None:
            raise ConfigError(
                f"adapter.targets has {missing}, which the {arch.family} family does not have. It has {', '.join(has)}. Choose among these."
            )
        chosen = tuple(t for t in get_args(Target) if t in (targets or [t for t in has if t != "experts"]))
        settings = AdapterSettings(rank, alpha, chosen)
        for target in chosen:
            for name, (out, columns) in projections(arch, target).items():
                if rank > min(out, columns):
                    raise ConfigError(
                        f"adapter.rank is {rank}, but {name} is {out} × {columns}: a rank above {min(out, columns)} adds nothing there. "
                        "Lower the rank, or leave it out of adapter.targets."
                    )
        return settings

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def num_parameters(arch: Architecture, settings: AdapterSettings) -> int:
    """Of all adapters of a model."""
    return sum(
        arch.num_layers
        * settings.rank
        * (out + columns)
        * (arch.experts.count if arch.experts and t == "experts" else 1)
        for t in settings.targets
        for out, columns in projections(arch, t).values()
    )


def projections(arch: Architecture, target: Target) -> dict[str, tuple[int, int]]:
    """Hugging Face name → (out, in) of one layer's adapted projections; of one expert's, for experts."""
    h, query, kv = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim
    if target == "qkv":
        if arch.fused_projections:
            return {"qkv_proj": (query + 2 * kv, h)}
        return {"q_proj": (query, h), "k_proj": (kv, h), "v_proj": (kv, h)}
    if target == "proj":
        return {"o_proj": (h, query)}
    ffn = arch.experts.ffn_size if arch.experts else arch.ffn_size
    first = {"gate_up_proj": (2 * ffn, h)} if arch.fused_projections else {"gate_proj": (ffn, h), "up_proj": (ffn, h)}
    second = {"down_proj": (h, ffn)}
    return {"fc1": first, "fc2": second, "experts": first | second}[target]
