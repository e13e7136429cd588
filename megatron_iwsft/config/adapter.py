"""The section `adapter` of a config: low-rank adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from megatron_iwsft.config.section import NonNegativeInt, PositiveFloat, Section
from megatron_iwsft.hf.adapters import Target


class Adapter(Section):
    """Low-rank adapters (LoRA): trained in place of the model's weights, which stay as they are."""

    rank: NonNegativeInt = 0
    """Rank of the adapters. 0: none; all weights are trained."""
    alpha: PositiveFloat = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's input that is dropped in training. Above 0, results depend on the parallel layout."""
    targets: list[Target] | None = None
    """Layers with adapters: qkv and proj of attention, fc1 and fc2 of a dense feed-forward part, experts (both layers of every expert).
    null: all of the model's, except experts."""
    init: str | None = None
    """Directory of a PEFT adapter to continue from, of the same rank, alpha and targets. null: A random, B zero, so that training starts
    from the model itself."""

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        given = self.model_fields_set - {"rank"}
        if not self.rank and any(getattr(self, name) != type(self).model_fields[name].default for name in given):
            raise ValueError("rank is 0, which means no adapters; set rank, or leave the other fields out")
        if self.targets is not None and (not self.targets or len(set(self.targets)) < len(self.targets)):
            raise ValueError(f"targets must name layers, each once; found {self.targets}")
        return self
