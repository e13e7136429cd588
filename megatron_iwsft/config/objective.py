"""The sections `objective` and `reference` of a config."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_iwsft.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from megatron_iwsft.objectives.functions import LEVELS, NORMALIZATIONS, OBJECTIVES, Level, Normalize


class Proposal(Section):
    """The proposal q, whose log-ratio to the reference gives the importance weights."""

    kind: Literal["current", "ema", "snapshot"] = "current"
    """Which model the proposal is.
    current: the policy, without gradient. ema: an exponential moving average of the policy. snapshot: an earlier copy of it.
    ema and snapshot keep a second model in memory and run it in the same pipeline pass."""
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """For ema: every `update_every` steps the average becomes decay · average + (1 − decay) · policy."""
    update_every: PositiveInt | None = None
    """For ema and snapshot: steps between updates of the copy."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Proposal:
        given = {name for name in ("decay", "update_every") if getattr(self, name) is not None}
        wanted = {"current": set(), "ema": {"decay", "update_every"}, "snapshot": {"update_every"}}[self.kind]
        if given != wanted:
            raise ValueError(
                f"kind {self.kind} takes {' and '.join(sorted(wanted)) or 'no other field'}; "
                f"found {', '.join(sorted(given)) or 'none'}"
            )
        return self


def _default_clips() -> str:
    texts = []
    for objective in OBJECTIVES.values():
        if objective.needs_reference:
            clips = {level: objective.clip_at(level) for level in LEVELS}
            levels = (f"[{low:g}, {high:g}] at {level} level" for level, (low, high) in clips.items())
            texts.append(f"{objective.name} {', '.join(levels)}")
    return ";\n".join(texts) + "."


class Objective(Section):
    """The loss: L = −(1/N) Σ_i s_i Σ_t w_t log π(a_t | s_t), with the weights w_t from proposal and reference."""

    name: str = "iw_sft"
    """sft (w = 1), iw_sft (importance weights), dft, psft, or a custom objective as path/to/file.py:function."""
    level: Level = "sequence"
    """For iw_sft, what a weight is made of.
    sequence: the mean log-ratio of a trajectory's trained tokens. trajectory: their sum, the importance ratio itself.
    token: each token's own log-ratio, one weight per token."""
    temperature: NonNegativeFloat = 1.0
    """τ in w = clip(exp(τ · log-ratio))."""
    clip: list[float] | None = Field(
        default=None,
        description="[low, high] bounds of the weights; for psft of the probability ratio.\nnull: " + _default_clips(),
    )
    normalize: Normalize = "tokens"
    """The denominator N of the loss, over the global batch.
    tokens: trained tokens. weights: the sum of s_i w_t over tokens.
    sequences: trajectories, each contributing its per-token mean. sequence_weights: the same, over the sum of s_i w_i."""
    proposal: Proposal = Proposal()
    router_balance: NonNegativeFloat = 0.0
    """Coefficient of the per-trajectory load-balancing loss of a mixture of experts, added to the objective."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in OBJECTIVES and ":" not in name:
            nearest = difflib.get_close_matches(name, OBJECTIVES, n=1)
            hint = f" (nearest: {nearest[0]})" if nearest else ""
            raise ValueError(
                f"must be one of {', '.join(OBJECTIVES)} or path/to/file.py:function{hint}; found {name!r}"
            )
        return name

    @model_validator(mode="after")
    def _has_a_proposal(self) -> Objective:
        built_in = OBJECTIVES.get(self.name)  # a custom one is not loaded yet
        conflict = built_in.proposal_conflict(self.proposal.kind) if built_in is not None else None
        if conflict:
            raise ValueError(conflict)
        return self

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> Objective:
        if self.clip is not None and (len(self.clip) != 2 or not 0 <= self.clip[0] < self.clip[1]):
            raise ValueError(f"clip must be [low, high] with 0 ≤ low < high; found {self.clip}")
        if self.router_balance and NORMALIZATIONS[self.normalize].by_weights:
            raise ValueError(
                "router_balance needs normalize: tokens or sequences; the sum of the weights is known only after the backward passes, "
                "of which the balance loss is part"
            )
        return self


class Reference(Section):
    """The reference policy that importance weights are relative to."""

    source: Literal["cached", "live", "base"] = "cached"
    """cached: log-probs computed once by `iwsft reference`. live: a frozen second model, run in the same pipeline pass.
    base: with adapters, the policy's own frozen weights, run in the same pipeline pass with the adapters off."""
    model: str | None = None
    """Hugging Face or checkpoint directory. null: the initial policy; with adapters, the model without them."""
    refresh: NonNegativeInt | Literal["epoch"] = 0
    """For live: copy the policy into the reference every so many steps, or at the start of each epoch. 0: never."""
    offload: bool = False
    """For live: keep the weights of reference and lagged proposal in host memory and copy them to the GPU for each forward pass.
    Not with precision.fp8, whose FP8 copies of the weights stay on the GPU."""

    @model_validator(mode="after")
    def _live_only(self) -> Reference:
        for name in ("refresh", "offload"):
            if getattr(self, name) and self.source != "live":
                raise ValueError(f"{name} needs source: live; a {self.source} reference never changes")
        if self.source == "base" and self.model is not None:
            raise ValueError("source base is the policy without its adapters; leave model out, or use cached or live")
        return self
