"""The models beside the policy: a run's reference and proposal, cached or live, fixed or following the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_iwsft.errors import DataError
from megatron_iwsft.model.gpt import PolicyModel
from megatron_iwsft.reference.frozen_stage import WithoutAdapters
from megatron_iwsft.reference.lagged_copy import LaggedCopy
from megatron_iwsft.reference.mixture import MixtureSidecars
from megatron_iwsft.train.setup import StartedRun, raise_together, reference_identities, starts_as_reference

# Mean |log-ratio| per token allowed before the first update, where policy and reference are the same model. A cached reference may
# have been computed at another layout, which changes the last bits; in FP8 the scales, too: emulated, 5e-3 for other rows of a random
# model, and 0.2 of a trained one with one scale per tensor (docs/gpu.md).
START_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 1e-1}


def verified_sidecars(run: StartedRun) -> MixtureSidecars:
    """The cached reference, each rank having verified some of its files. Collective; raises DataError on all ranks."""
    sidecars = MixtureSidecars(run.mixture, reference_identities(run))
    raise_together(sidecars.damage(run.platform.rank, run.platform.world_size))
    return sidecars


def live_reference(run: StartedRun, policy: list[PolicyModel]) -> Sequence[torch.nn.Module]:
    """This rank's chunks of the reference: a model of its own, or the policy without its adapters. Collective over all ranks."""
    if run.config.reference.source == "base":
        return [WithoutAdapters(chunk) for chunk in policy]
    return run.build(run.reference)


def lagged_copies(run: StartedRun, live: Sequence[Any] | None, proposal: list[PolicyModel] | None) -> list[LaggedCopy]:
    """The frozen models that are updated from the policy."""
    out, settings, refresh = [], run.config.objective.proposal, run.config.reference.refresh
    if proposal is not None:
        every = settings.update_every
        assert every is not None
        out.append(LaggedCopy("proposal", proposal, lambda step: step % every == 0, settings.decay or 0.0))
    if refresh and live is not None:

        def due(step: int) -> bool:
            return run.sampler.position_at(step).pack == 0 if refresh == "epoch" else step % refresh == 0

        out.append(LaggedCopy("reference", list(live), due))
    return out


def scaled_by_history(
    run: StartedRun, live: Sequence[Any] | None, proposal: list[PolicyModel] | None
) -> dict[str, Sequence[Any]]:
    """The frozen models with weights of their own, if their FP8 scales follow the steps. Emulation keeps its histories to itself."""
    if not run.config.precision.scaled_by_steps:
        return {}
    own = {"reference": None if run.config.reference.source == "base" else live, "proposal": proposal}
    return {name: chunks for name, chunks in own.items() if chunks is not None}


def check_start(run: StartedRun, metrics: dict[str, Any]) -> None:
    """Before the first update, a reference that is the initial policy must give the policy's own log-probs."""
    if not starts_as_reference(run):
        return
    precision = run.config.precision
    found, allowed = metrics["abs_log_ratio"], START_TOLERANCE["fp8" if precision.fp8 else precision.dtype]
    if not found <= allowed:  # also for nan
        raise DataError(
            f"policy and reference are the same model, yet their log-probs differ by {found:.3g} per token on the first batch "
            f"(allowed in {precision.described}: {allowed:g}). Model, tokenizer and template match by fingerprint, so the "
            "cached log-probs are damaged or were computed by another version: remove the corpus's reference-* directory and run "
            "`iwsft reference` again, or use reference.source: live."
        )
