"""Sampling: which trajectories an epoch contains, their order and their packing.

A pure function (lengths, scores, settings, seed, epoch) → index arrays. Every node computes the same plan, once, so nothing is
broadcast and a resumed run needs only its position (`Position`).
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megatron_iwsft.data.packing import Packs, best_fit, index_dtype, length_counts, one_per_pack, packs_needed
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.utils.node_arrays import Arrays, node_arrays

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

    lengths        int [n] in tokens
    scores         float [n], NaN where a trajectory has none
    seq_length     in tokens
    pad_to         trajectories are packed as if padded to a multiple of it
    group_by_cost  the packs of a step have similarly much attention
    parts          of a mixture, in order, all with weights or none
    identity       of lengths and scores, by which the ranks of a node share plans; without one, each makes its own
    start          where these settings begin to apply, in a run that was continued with other ones

    Raises ConfigError if a trajectory is longer than seq_length, DataError if the scores do not suit the quality mode.
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
        pad_to: int = 1,
        group_by_cost: bool = False,
        parts: Sequence[Part] = (),
        identity: str = "",
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the corpus contains no trajectories. Check data.corpus with `iwsft inspect`.")
        longest = _padded(int(lengths.max()), pad_to)
        if longest > seq_length:
            too_long = int((_padded(lengths, pad_to) > seq_length).sum())
            raise ConfigError(
                f"data.seq_length is {seq_length}, but {too_long} of {len(lengths)} trajectories are "
                f"longer (up to {longest} tokens). Raise data.seq_length, or shard the corpus with --max-tokens {seq_length}."
            )
        self.lengths, self.scores = lengths, scores
        self.seq_length, self.packing, self.pad_to, self.identity = seq_length, packing, pad_to, identity
        self.global_batch_size, self.quality, self.seed = global_batch_size, quality, seed
        self.group_by_cost, self._dtype = group_by_cost, index_dtype(len(lengths))
        self.parts = list(parts) or [Part("", len(lengths))]
        self._starts = np.cumsum([0, *(part.size for part in self.parts)]).tolist()
        assert self._starts[-1] == len(lengths)
        for number in range(len(self.parts)):
            self._check_scores(number)
        self._pass_sizes = [self._one_pass_size(number) for number in range(len(self.parts))]
        self.start = Position()
        self._plans = lru_cache(maxsize=2)(self._epoch)
        self._one_at_a_time = threading.Lock()  # batches are built in a thread
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

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, counted from 0."""
        with self._one_at_a_time:
            return self._plans(epoch)

    def _epoch(self, epoch: int) -> EpochPlan:
        def compute() -> Packs:
            rng = self._rng(epoch)
            packs = self._packed(rng.permutation(self._trajectories(epoch, rng)), rng)
            return self._grouped(packs, rng) if self.group_by_cost else packs

        return self._shared(f"plan of epoch {epoch}", compute)

    def _shared(self, what: str, compute: Callable[[], Packs]) -> EpochPlan:
        """A plan that the ranks of a node share."""
        arrays = self._arrays(what, lambda: vars(compute()).copy())
        return EpochPlan(Packs(**arrays), self.global_batch_size)

    def _arrays(self, what: str, compute: Callable[[], Arrays]) -> Arrays:
        if not self.identity:
            return compute()
        grouped_by = self.global_batch_size if self.group_by_cost else None
        settings = (self.seed, self.seq_length, self.packing, self.pad_to, self.quality, self.parts, grouped_by)
        return node_arrays(f"{what}: {settings} {self.identity}", compute)

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))

    def _trajectories(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """An epoch's trajectories in the order of the corpora, each as often as it is trained on."""
        parts = []
        for number in self._active(epoch):
            parts.append(self._population(number, epoch, rng))
            parts[-1] += self._starts[number]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def appearances(self, epoch: int) -> np.ndarray:
        """How often each trajectory is in an epoch, int64 [n]. Does not plan the epoch."""
        return np.bincount(self._trajectories(epoch, self._rng(epoch)), minlength=len(self.lengths))

    def _packed(self, ids: np.ndarray, rng: np.random.Generator) -> Packs:
        """Trajectories `ids` in packs, whose order is random."""
        if self.packing == "none":
            return Packs(one_per_pack(len(ids)).offsets, ids)
        packs = best_fit(_padded(self.lengths[ids], self.pad_to), self.seq_length, order=rng)
        return Packs(packs.offsets, ids[packs.items])

    def _grouped(self, packs: Packs, rng: np.random.Generator) -> Packs:
        """The packs in steps of similar Σ n² over their trajectories of n tokens. Steps come in random order; what is left over, a random
        choice, is the last.

        Of packs with equally many tokens, only the attention differs, which grows with this sum whatever the model.
        """
        squares = np.add.reduceat(np.square(self.lengths[packs.items], dtype=np.int64), packs.offsets[:-1])
        full = len(packs) // self.global_batch_size * self.global_batch_size
        by_cost = np.argsort(squares[:full], kind="stable")  # of packs in random order
        steps = rng.permutation(by_cost.reshape(-1, self.global_batch_size))
        return packs.take(np.concatenate([steps.ravel(), np.arange(full, len(packs))]))

    def _population(self, number: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """The trajectories of part `number` in an epoch, as indices within the part, each as often as it is trained on."""
        first, end = self._drawn_before(number, epoch), self._drawn_before(number, epoch + 1)
        if self.quality.mode == "sample":
            scores = self._scores_of(number)
            return rng.choice(len(scores), size=end - first, p=scores / scores.sum()).astype(self._dtype)
        once = self._one_pass(number)
        passes, more = divmod(end - first, len(once))
        whole = once if passes == 1 else np.tile(once, passes)
        if not more:
            return whole.astype(self._dtype, copy=False)
        # The same order in every epoch, and each takes up where the one before ended: no trajectory is ahead of another by two.
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,))).permutation(once)
        return np.concatenate([whole, order[(first + np.arange(more)) % len(once)]]).astype(self._dtype, copy=False)

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
            return np.arange(n, dtype=self._dtype)
        scores = self._scores_of(number)
        times = sum((scores >= c).astype(np.int64) for c in self.quality.thresholds)
        return np.repeat(np.arange(n, dtype=self._dtype), times)

    def _one_pass_size(self, number: int) -> int:
        if self.quality.mode != "thresholds":
            return self.parts[number].size
        return sum(int((self._scores_of(number) >= c).sum()) for c in self.quality.thresholds)

    def covering(self) -> EpochPlan:
        """Every trajectory of the corpus at least once: the packs of epoch 0 that hold a further one, in order, then the rest."""
        plan = self.epoch(0)  # by every rank of the node: files are kept until all have mapped them
        return self._shared("covering plan", lambda: self._covering(plan))

    def _covering(self, plan: EpochPlan) -> Packs:
        items = plan.packs.items
        place = np.full(len(self.lengths), len(items))
        np.minimum.at(place, items, np.arange(len(items)))  # where each trajectory comes first
        rest = np.flatnonzero(place == len(items))
        pack_of = np.repeat(np.arange(len(plan.packs)), np.diff(plan.packs.offsets))
        first = plan.packs.take(np.unique(pack_of[place[place < len(items)]]))
        return first.followed_by(self._packed(rest, self._rng(0)))

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
        """Does not plan the epoch: best fit needs the same number of packs for the same lengths in any order."""
        era = self._eras(epoch + 1)[-1]
        counted = era if self._every_epoch_has_the_same(era) else epoch
        with self._one_at_a_time:
            if counted not in self._packs:
                arrays = self._arrays(
                    f"packs of epoch {counted}", lambda: {"count": np.array([self._count_packs(counted)])}
                )
                self._packs[counted] = int(arrays["count"][0])
            return self._packs[counted]

    def _count_packs(self, epoch: int) -> int:
        ids = self._trajectories(epoch, self._rng(epoch))
        if self.packing == "none":
            return len(ids)
        return packs_needed(length_counts(_padded(self.lengths[ids], self.pad_to), self.seq_length), self.seq_length)

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
            # Without them, a run that continues would draw each earlier epoch again, to count its packs.
            **(
                {"packs": {str(epoch): n for epoch, n in self._packs.copy().items()}}
                if self.quality.mode == "sample"
                else {}
            ),
        }

    def continue_with(self, state: dict[str, Any], step: int) -> Position:
        """Take up a run after `step` steps under the settings in `state`; returns where that is.

        Another global batch size applies from there on. Parts that the run did not have join with the first epoch that it has not begun.
        """
        own_size, earlier = self.global_batch_size, state["first_epochs"]
        never = [sys.maxsize] * (len(self.parts) - len(earlier))
        self._plan(Position(**state["start"]), state["global_batch_size"], [*earlier, *never])
        self._packs = {int(epoch): count for epoch, count in state.get("packs", {}).items()}
        at = self.position_at(step)
        if own_size != state["global_batch_size"] or never:
            next_epoch = at.epoch + (at.pack > 0)
            self._plan(at, own_size, [*earlier, *(next_epoch for _ in never)])
        return at

    def _plan(self, start: Position, global_batch_size: int, first_epochs: list[int]) -> None:
        self.start, self.global_batch_size = start, global_batch_size
        self.parts = [replace(part, first_epoch=first) for part, first in zip(self.parts, first_epochs, strict=True)]
        self._packs.clear()
        self._plans.cache_clear()


def _padded(lengths: Any, multiple: int) -> Any:
    """Lengths, an array or one, padded to a multiple."""
    return lengths if multiple == 1 else -(-lengths // multiple) * multiple
