"""Custom objectives: loaded from a user's Python file, and checked before a run starts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.functions import OBJECTIVES, Objective, Settings, Trajectories, local_segment_sum
from megatron_iwsft.objectives.loss import SUMS, micro_batch_loss, own_sums, sum_names
from megatron_iwsft.utils.user_code import load_from_file

# Two made-up trajectories, end to end.
_LENGTHS = (5, 7)
_MASK = torch.tensor([0.0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1])


def find_objective(name: str) -> Objective:
    """One of OBJECTIVES, or what `path/to/file.py:name` defines: an `Objective`, or a function, which gets the defaults of one.

    Raises ConfigError if there is none, or if it fails `check_objective`.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    found = load_from_file(name, "objective.name")
    objective = found if isinstance(found, Objective) else Objective(name, found)
    check_objective(objective, name)
    return objective


def source_hash(name: str) -> str | None:
    """SHA-256 of a custom objective's file; None for one of OBJECTIVES."""
    return None if name in OBJECTIVES else hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()


def check_objective(objective: Objective, name: str) -> None:
    """Try a custom objective on two made-up trajectories. Raises ConfigError naming the rule that it breaks.

    Loss, weights and extra sums must be float32 [T], finite, and 0 where not trained on. The loss must have a finite gradient that is
    not 0 everywhere and is 0 where not trained on. A trajectory's loss must not depend on other trajectories: which ones share a
    micro-batch depends on the layout. Each of its metrics must be a number, or a list of numbers, computed from known sums.
    """
    together = _evaluate(objective, name, [0, 1])
    for i, part in enumerate(_parts()):
        for alone, among in zip(_evaluate(objective, name, [i]), together, strict=True):
            if not torch.allclose(alone, among[part], rtol=1e-5, atol=1e-7):
                raise ConfigError(
                    f"objective.name: {name} must not let one trajectory's loss depend on another. Return per-token values, without means "
                    "over the batch."
                )
    _check_metrics(objective, name)


def _check_metrics(objective: Objective, name: str) -> None:
    out = micro_batch_loss(objective, _trajectories([0, 1]), _settings(objective))
    names = sum_names(objective)
    sums = dict(zip(names, out.sums.tolist(), strict=True)) | {"weight_max": float(out.weight_max)}
    for metric in objective.metrics:
        what = f"objective.name: {name}: metric {metric.name!r}"
        try:
            value = metric.value(sums)
        except Exception as error:  # a user's function can raise anything
            raise ConfigError(
                f"{what} fails: {type(error).__name__}: {error}. It can read the sums {', '.join(sums)}; a sum of Weighted.extra is among "
                "them if a metric names it as numerator or denominator. "
                "Correct the metric."
            ) from error
        if not _is_number(value) and not (isinstance(value, list) and all(map(_is_number, value))):
            raise ConfigError(f"{what} must be a number or a list of numbers; found {type(value).__name__}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _settings(objective: Objective) -> Settings:
    return Settings(clip=objective.clip_at("sequence"))


def _evaluate(objective: Objective, name: str, which: list[int]) -> tuple[Tensor, Tensor]:
    """(loss, its gradient), each [T], of some of the trajectories."""
    t = _trajectories(which)
    try:
        out = objective.function(t, _settings(objective))
        fields: dict[str, Any] = {"loss": out.loss, "weight": out.weight, "clipped": out.clipped}
        fields |= {f"extra[{sum_!r}]": out.extra.get(sum_) for sum_ in own_sums(objective)}
    except Exception as error:  # a user's function can raise anything
        raise ConfigError(
            f"objective.name: {name} fails: {type(error).__name__}: {error}. Correct the function."
        ) from error
    shadowed = sorted(out.extra.keys() & SUMS.keys())
    if shadowed:
        raise ConfigError(
            f"objective.name: {name} returns extra[{shadowed[0]!r}], which is the name of a built-in sum. Rename it."
        )

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(f"objective.name: {name} must {what}.")

    def clean(value: Tensor) -> bool:
        return bool(value.isfinite().all()) and not bool((value * (1 - t.mask)).any())

    for field, value in fields.items():
        right = isinstance(value, Tensor) and value.shape == t.mask.shape and value.dtype == torch.float32
        require(right, f"return {field} as float32 [T]")
        require(clean(value), f"return {field} finite, and 0 where not trained on")
    require(out.loss.requires_grad and not out.weight.requires_grad, "return a loss with gradient and a weight without")
    (gradient,) = torch.autograd.grad(out.loss.sum(), t.logprobs)
    require(
        clean(gradient) and bool(gradient.any()), "have a finite gradient, not 0 everywhere, and 0 where not trained on"
    )
    return out.loss.detach(), gradient


def _parts() -> list[slice]:
    return [slice(0, _LENGTHS[0]), slice(_LENGTHS[0], sum(_LENGTHS))]


def _trajectories(which: list[int]) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    values = (*(-torch.rand(2, sum(_LENGTHS), generator=generator) - 0.1), _MASK)
    logprobs, reference, mask = (torch.cat([x[_parts()[i]] for i in which]) for x in values)
    segment = torch.cat([torch.full((_LENGTHS[i],), k) for k, i in enumerate(which)])
    logprobs = (logprobs * mask).requires_grad_()
    segment_sum = local_segment_sum(segment, len(which))
    return Trajectories(
        logprobs=logprobs,
        proposal=logprobs.detach(),
        reference=reference * mask,
        mask=mask,
        segment=segment,
        lengths=segment_sum(mask),
        quality=torch.ones(len(which)),
        segment_sum=segment_sum,
    )
