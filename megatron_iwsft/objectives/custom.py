"""A user's own objective, from a Python file: loaded, and checked before a run starts."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.functions import (
    NEEDS_REFERENCE,
    OBJECTIVES,
    ObjectiveFunction,
    Settings,
    Trajectories,
    local_segment_sum,
)

# Two made-up trajectories, end to end.
_LENGTHS = (5, 7)
_MASK = torch.tensor([0.0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1])


def find_objective(name: str) -> ObjectiveFunction:
    """One of OBJECTIVES, or `path/to/file.py:function`, checked by `check_objective`. Raises ConfigError."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"objective.name: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(f"objective.name: {path} cannot be loaded: {type(error).__name__}: {error}.") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"objective.name: {path} defines no function {function}.")
    check_objective(found, name)
    return found


def source_hash(name: str) -> str | None:
    """SHA-256 of the file that an objective of one's own stands in; None for one of OBJECTIVES."""
    return None if name in OBJECTIVES else hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()


def needs_reference(objective: ObjectiveFunction) -> bool:
    """A user's function says so by an attribute `needs_reference`, True unless it sets it."""
    return objective in NEEDS_REFERENCE or getattr(objective, "needs_reference", objective not in OBJECTIVES.values())


def check_objective(objective: ObjectiveFunction, name: str) -> None:
    """Try a user's objective on two made-up trajectories. Raises ConfigError saying what it must do and does not.

    Its loss and weights must be float32 [T], finite, and 0 where not trained on; the loss must have a finite gradient that is
    not 0 everywhere and is 0 where not trained on; and a trajectory's loss must not depend on the other one, or layouts would.
    """
    together = _evaluate(objective, name, [0, 1])
    for i, part in enumerate(_parts()):
        for alone, among in zip(_evaluate(objective, name, [i]), together, strict=True):
            if not torch.allclose(alone, among[part], rtol=1e-5, atol=1e-7):
                raise ConfigError(
                    f"objective.name: {name} must not let one trajectory's loss depend on another: return sums, no means over a batch."
                )


def _evaluate(objective: ObjectiveFunction, name: str, which: list[int]) -> tuple[Tensor, Tensor]:
    """(loss, its gradient), each [T], of some of the trajectories."""
    t = _trajectories(which)
    try:
        out = objective(t, Settings())
        fields = {"loss": out.loss, "weight": out.weight, "clipped": out.clipped}
    except Exception as error:  # whatever a user's function raises
        raise ConfigError(f"objective.name: {name} fails: {type(error).__name__}: {error}.") from error

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
