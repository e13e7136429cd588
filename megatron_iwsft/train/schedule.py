"""The learning rate of each step, and what happens to it when a run is continued with other settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_iwsft.config import schema as config

_WSD_DECAY = 0.2  # of all steps, where optimizer.decay_fraction is null
_DECIMALS = 1e-9  # relative difference below which two learning rates are the same


@dataclass(frozen=True)
class Shape:
    """Learning rate over steps, without what re-warming changes.

    warmup    steps with linear warm-up; the first of them already learns, the last has the peak
    decay     steps at the end with decay to `minimum`; after that it stays there
    style     cosine | linear | wsd (linear) | constant (no decay)
    """

    peak: float
    minimum: float
    warmup: int
    decay: int
    total: int
    style: str

    @staticmethod
    def of(settings: config.Optimizer, total_steps: int) -> Shape:
        warmup = min(round(settings.warmup_fraction * total_steps), total_steps - 1)
        decay = total_steps - warmup
        if settings.schedule == "wsd":
            share = _WSD_DECAY if settings.decay_fraction is None else settings.decay_fraction
            decay = min(decay, max(1, round(share * total_steps)))
        return Shape(settings.lr, settings.min_lr, warmup, decay, total_steps, settings.schedule)

    def at(self, done: int) -> float:
        """Learning rate of the step after `done` finished ones."""
        if done < self.warmup:
            return self.peak * (done + 1) / self.warmup
        if self.style == "constant":
            return self.peak
        share = min(max(done - (self.total - self.decay), 0) / self.decay, 1.0)
        kept = 0.5 * (math.cos(math.pi * share) + 1.0) if self.style == "cosine" else 1.0 - share
        return self.minimum + kept * (self.peak - self.minimum)


@dataclass(frozen=True)
class Rewarming:
    """After step `start`, the learning rate moves linearly from `rate` to the shape's, which it reaches after `steps` steps."""

    start: int
    steps: int
    rate: float


class HasGroups(Protocol):
    """An optimizer of torch or Megatron-Core. Loading its state replaces the groups."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Schedule:
    """Sets learning rate and weight decay of an optimizer's parameter groups; `wd_mult` of a group multiplies its weight decay.

    changed  after `load_state_dict`: (earlier, new) learning rate of the next step, if the checkpoint's settings give another one
    """

    def __init__(self, optimizer: HasGroups, settings: config.Optimizer, total_steps: int) -> None:
        self._optimizer = optimizer
        self._settings, self._shape = settings, Shape.of(settings, total_steps)
        self._loaded: dict[str, Any] | None = None
        self._done = 0
        self._rewarming: Rewarming | None = None
        self.changed: tuple[float, float] | None = None
        self._apply()

    def step(self) -> None:
        """After each update; a skipped step does not advance the schedule."""
        self._done += 1
        self._apply()

    @property
    def rate(self) -> float:
        """Of the next step."""
        return _rate(self._shape, self._rewarming, self._done)

    def _apply(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate
            group["weight_decay"] = self._settings.weight_decay * group.get("wd_mult", 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self._done,
            "shape": asdict(self._shape),
            "rewarming": None if self._rewarming is None else asdict(self._rewarming),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the position from a checkpoint, and everything else from this run's settings."""
        if "done" not in state:
            state = _of_megatron(state)
        self._loaded = state
        self._done, self.changed = state["done"], None
        earlier = Shape(**state["shape"])
        self._rewarming = None if state["rewarming"] is None else Rewarming(**state["rewarming"])
        if earlier != self._shape:
            before = _rate(earlier, self._rewarming, self._done)
            self._rewarming = None
            if abs(before - self.rate) > _DECIMALS * max(before, self.rate):
                self.changed = before, self.rate
                if self._settings.rewarm_steps:
                    self._rewarming = Rewarming(self._done, self._settings.rewarm_steps, before)
        self._apply()

    def set_total_steps(self, total_steps: int) -> None:
        """The run turns out to have another number of steps, after its checkpoint was loaded and before it continues."""
        self._shape = Shape.of(self._settings, total_steps)
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
        self._apply()

    def described_change(self) -> str:
        """What `changed` means for the run, for the log; empty if nothing has changed."""
        if self.changed is None:
            return ""
        before, now = self.changed
        how = (
            f"moves from {before:.3g} to the new schedule's within {self._settings.rewarm_steps} steps (optimizer.rewarm_steps)"
            if self._settings.rewarm_steps
            else f"is {now:.3g} from the next step on; by the earlier settings it would be {before:.3g}. "
            "optimizer.rewarm_steps moves there gradually"
        )
        return f"the settings of the schedule have changed, and the learning rate {how}."


def _rate(shape: Shape, rewarming: Rewarming | None, done: int) -> float:
    target = shape.at(done)
    if rewarming is None or done >= rewarming.start + rewarming.steps:
        return target
    share = (done - rewarming.start + 1) / rewarming.steps
    return rewarming.rate + share * (target - rewarming.rate)


def _of_megatron(state: dict[str, Any]) -> dict[str, Any]:
    """The state that Megatron-Core's scheduler wrote before there was this one."""
    warmup, total = state["lr_warmup_steps"], state["lr_decay_steps"]
    shape = Shape(state["max_lr"], state["min_lr"], warmup, total - warmup, total, state["lr_decay_style"])
    return {"done": state["num_steps"], "shape": asdict(shape), "rewarming": None}
