"""Sampling: which trajectories an epoch contains, their order and their packing.

A pure function (lengths, scores, settings, seed, epoch) → index arrays. Every rank computes the same plan, so nothing is
broadcast and a resumed run needs only its position (`Position`).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_iwsft.data.packing import Packs, best_fit, one_per_pack
from megatron_iwsft.errors import ConfigError, DataError

QualityMode = Literal["none", "sample", "weight", "thresholds"]


@dataclass(frozen=True)
class Quality:
    """How quality scores are used (the paper's SFT(Q) and iw-SFT(Q)).

    none: each trajectory once; sample: drawn with replacement in proportion to score; weight: loss weight s_i = score;
    thresholds: each trajectory once per threshold that its score reaches.
    """

    mode: QualityMode = "none"
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture: the next `size` of the sampler's trajectories, and how many of them an epoch has.

    epochs  passes over the corpus in each epoch; may be fractional
    weight  instead: the share of the epoch's trajectories, relative to the other parts' weights. The epoch then has as many
            trajectories as one pass over each part

    One pass is each trajectory once (quality modes none and weight), once per threshold that it reaches (thresholds), or `size` draws
    (sample).

    first_epoch  epochs before it have nothing of this corpus: it was appended to a run
    """

    name: str
    size: int
    epochs: float = 1.0
    weight: float | None = None
    first_epoch: int = 0


@dataclass(frozen=True)
class Position:
    """Where a run is in its data: after `step` steps, the next one begins with sequence `pack` of epoch `epoch`. All counted from 0."""

    step: int = 0
    epoch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: `packs` of corpus trajectory indices, in training order."""

    packs: Packs
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        return -(-len(self.packs) // self.global_batch_size)

    def step(self, index: int) -> list[np.ndarray]:
        """The packs of global batch `index`."""
        return self.batch(index * self.global_batch_size)

    def batch(self, start: int) -> list[np.ndarray]:
        """`global_batch_size` packs from `start` on; at the end of the epoch the last ones are empty."""
        stop = min(start + self.global_batch_size, len(self.packs))
        packs = [self.packs[p] for p in range(start, stop)]
        return packs + [np.zeros(0, np.int64)] * (self.global_batch_size - len(packs))


class Sampler:
    """Plans the epochs over a corpus or a mixture of several.

    lengths int [n] in tokens; scores float [n] (NaN where a trajectory has none); seq_length in tokens; parts: of a mixture, in
    order, all with weights or none. Raises ConfigError if a trajectory is longer than seq_length, DataError if the scores do not suit
    the quality mode.

    start  where these settings begin to apply, in a run that was continued with other ones
    """

    def __init__(
        self,
        lengths: np.ndarray,
        scores: np.ndarray,
        *,
        seq_length: int,
        packing: Literal["best_fit", "none"],
        global_batch_size: int,
        quality: Quality,
        seed: int,
        parts: Sequence[Part] = (),
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the corpus contains no trajectories. Check data.corpus with `iwsft inspect`.")
        longest = int(lengths.max())
        if longest > seq_length:
            raise ConfigError(
                f"data.seq_length is {seq_length}, but {int((lengths > seq_length).sum())} of {len(lengths)} trajectories are "
                f"longer (up to {longest} tokens). Raise data.seq_length, or shard the corpus with --max-tokens {seq_length}."
            )
        self.lengths, self.scores = lengths, scores
        self.seq_length, self.packing = seq_length, packing
        self.global_batch_size, self.quality, self.seed = global_batch_size, quality, seed
        self.parts = list(parts) or [Part("", len(lengths))]
        self._starts = np.cumsum([0, *(part.size for part in self.parts)]).tolist()
        assert self._starts[-1] == len(lengths)
        for number in range(len(self.parts)):
            self._check_scores(number)
        self._pass_sizes = [self._one_pass_size(number) for number in range(len(self.parts))]
        self.start = Position()
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._packs: dict[int, int] = {}

    def _check_scores(self, number: int) -> None:
        """Raise DataError if a part's scores do not suit the quality mode."""
        quality, scores = self.quality, self._scores_of(number)
        of_part = f" of corpus {self.parts[number].name}" if len(self.parts) > 1 else ""
        if quality.mode == "none":
            return
        missing = int(np.isnan(scores).sum())
        if missing:
            raise DataError(
                f"data.quality.mode is {quality.mode}, but {missing} of {len(scores)} trajectories{of_part} have no score. "
                "Shard the corpus again with --score-field, or use data.quality.mode: none."
            )
        if quality.mode in ("sample", "weight") and (scores.min() < 0 or scores.sum() <= 0):
            raise DataError(
                f"data.quality.mode {quality.mode} needs scores ≥ 0 with a positive sum; found {scores.min():g} … {scores.max():g}"
                f"{of_part}."
            )
        if quality.mode == "thresholds" and not (scores >= min(quality.thresholds)).any():
            raise DataError(
                f"no trajectory{of_part} reaches the lowest of data.quality.thresholds, {min(quality.thresholds):g}. "
                "Lower data.quality.thresholds."
            )

    def _scores_of(self, number: int) -> np.ndarray:
        return self.scores[self._starts[number] : self._starts[number + 1]]

    def _epoch(self, epoch: int) -> EpochPlan:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        parts = [self._starts[k] + self._population(k, epoch, rng) for k in self._active(epoch)]
        ids = rng.permutation(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return EpochPlan(self._packed(ids, rng), self.global_batch_size)

    def _packed(self, ids: np.ndarray, rng: np.random.Generator) -> Packs:
        """Trajectories `ids` in packs, whose order is random."""
        if self.packing == "none":
            packs = one_per_pack(len(ids))
        else:
            packed = best_fit(self.lengths[ids], self.seq_length)
            packs = packed.take(rng.permutation(len(packed)))  # best fit places the longest first
        return Packs(packs.offsets, ids[packs.items])

    def _population(self, number: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """The trajectories of part `number` in an epoch, as indices within the part, each as often as it is trained on."""
        first, end = self._drawn_before(number, epoch), self._drawn_before(number, epoch + 1)
        if self.quality.mode == "sample":
            scores = self._scores_of(number)
            return rng.choice(len(scores), size=end - first, p=scores / scores.sum())
        once = self._one_pass(number)
        passes, more = divmod(end - first, len(once))
        whole = once if passes == 1 else np.tile(once, passes)
        if not more:
            return whole
        # The same order in every epoch, and each takes up where the one before ended: no trajectory is ahead of another by two.
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,))).permutation(once)
        return np.concatenate([whole, order[(first + np.arange(more)) % len(once)]])

    def _drawn_before(self, number: int, epoch: int) -> int:
        """How many trajectories of a part all epochs before `epoch` have."""
        begins = self._eras(epoch)
        eras = itertools.pairwise([*begins, epoch])
        return round(sum((end - begin) * self._drawn_per_epoch(number, begin) for begin, end in eras))

    def _drawn_per_epoch(self, number: int, epoch: int) -> float:
        part, active = self.parts[number], self._active(epoch)
        if number not in active:
            return 0.0
        if part.weight is None:
            return part.epochs * self._pass_sizes[number]
        weights, sizes = (sum(column[k] or 0.0 for k in active) for column in (self._weights, self._pass_sizes))
        return part.weight / weights * sizes

    @property
    def _weights(self) -> list[float | None]:
        return [part.weight for part in self.parts]

    def _active(self, epoch: int) -> list[int]:
        """The parts that an epoch draws from."""
        return [number for number, part in enumerate(self.parts) if part.first_epoch <= epoch]

    def _eras(self, before: int) -> list[int]:
        """The epochs, the first one and those before `before`, with which a part joins."""
        return sorted({0, *(part.first_epoch for part in self.parts if part.first_epoch < before)})

    def _one_pass(self, number: int) -> np.ndarray:
        """The trajectories of one pass over a part, as indices within it."""
        n = self.parts[number].size
        if self.quality.mode != "thresholds":
            return np.arange(n)
        scores = self._scores_of(number)
        return np.repeat(np.arange(n), sum((scores >= c).astype(np.int64) for c in self.quality.thresholds))

    def _one_pass_size(self, number: int) -> int:
        if self.quality.mode != "thresholds":
            return self.parts[number].size
        return sum(int((self._scores_of(number) >= c).sum()) for c in self.quality.thresholds)

    def covering(self) -> EpochPlan:
        """Every trajectory of the corpus at least once: the packs of epoch 0 that hold a further one, in order, then the rest."""
        plan = self.epoch(0)
        items = plan.packs.items
        place = np.full(len(self.lengths), len(items))
        np.minimum.at(place, items, np.arange(len(items)))  # where each trajectory comes first
        rest = np.flatnonzero(place == len(items))
        pack_of = np.repeat(np.arange(len(plan.packs)), np.diff(plan.packs.offsets))
        first = plan.packs.take(np.unique(pack_of[place[place < len(items)]]))
        last = self._packed(rest, np.random.default_rng(np.random.SeedSequence([self.seed, 0])))
        return EpochPlan(first.followed_by(last), self.global_batch_size)

    def plan_of(self, ids: np.ndarray) -> EpochPlan:
        """Trajectories `ids`, once each."""
        return EpochPlan(self._packed(ids, np.random.default_rng(0)), self.global_batch_size)

    def trajectory_weights(self, ids: np.ndarray) -> np.ndarray:
        """Loss weights s_i of trajectories `ids`, float32 [len(ids)]."""
        if self.quality.mode == "weight":
            return self.scores[ids].astype(np.float32)
        return np.ones(len(ids), dtype=np.float32)

    def steps_in(self, epoch: int) -> int:
        """Of a complete epoch."""
        return -(-self._packs_in(epoch) // self.global_batch_size)

    def _packs_in(self, epoch: int) -> int:
        # Best fit needs the same number of packs for the same lengths in any order.
        era = self._eras(epoch + 1)[-1]
        planned = era if self._every_epoch_has_the_same(era) else epoch
        if planned not in self._packs:
            self._packs[planned] = len(self.epoch(planned).packs)
        return self._packs[planned]

    def _every_epoch_has_the_same(self, era: int) -> bool:
        """Whether all epochs with the parts of epoch `era` contain the same trajectories equally often."""
        return self.quality.mode != "sample" and not any(
            self._drawn_per_epoch(number, era) % self._pass_sizes[number] for number in self._active(era)
        )

    def total_steps(self, epochs: int | None, max_steps: int | None) -> int:
        """Number of steps of a run that ends after `epochs` or `max_steps`, whichever comes first."""
        if epochs is None:
            assert max_steps is not None
            return max_steps
        total, pack = self.start.step, self.start.pack
        for epoch in range(self.start.epoch, epochs):
            total += -(-(self._packs_in(epoch) - pack) // self.global_batch_size)
            pack = 0
            if max_steps is not None and total >= max_steps:
                return max_steps
        return total

    def position_at(self, step: int) -> Position:
        """Where the run is after `step` steps, which are not before `start`."""
        left, epoch, pack = step - self.start.step, self.start.epoch, self.start.pack
        assert left >= 0, (step, self.start)
        while left >= (steps := -(-(self._packs_in(epoch) - pack) // self.global_batch_size)):
            left, epoch, pack = left - steps, epoch + 1, 0
        return Position(step, epoch, pack + left * self.global_batch_size)

    def packs_at(self, step: int) -> list[np.ndarray]:
        """The packs of global step `step`, from 0: `global_batch_size` arrays of trajectory indices."""
        at = self.position_at(step)
        return self.epoch(at.epoch).batch(at.pack)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint: what `continue_with` needs besides the sampler's own settings."""
        return {
            "start": asdict(self.start),
            "global_batch_size": self.global_batch_size,
            "first_epochs": [part.first_epoch for part in self.parts],
        }

    def continue_with(self, state: dict[str, Any], step: int) -> Position:
        """Take up a run after `step` steps under the settings in `state`; returns where that is.

        Another global batch size applies from there on. Parts that the run did not have join with the first epoch that it has not begun.
        """
        own_size, earlier = self.global_batch_size, state["first_epochs"]
        never = [sys.maxsize] * (len(self.parts) - len(earlier))
        self._plan(Position(**state["start"]), state["global_batch_size"], [*earlier, *never])
        at = self.position_at(step)
        if own_size != state["global_batch_size"] or never:
            next_epoch = at.epoch + (at.pack > 0)
            self._plan(at, own_size, [*earlier, *(next_epoch for _ in never)])
        return at

    def _plan(self, start: Position, global_batch_size: int, first_epochs: list[int]) -> None:
        self.start, self.global_batch_size = start, global_batch_size
        self.parts = [replace(part, first_epoch=first) for part, first in zip(self.parts, first_epochs, strict=True)]
        self._packs.clear()
        self.epoch.cache_clear()
