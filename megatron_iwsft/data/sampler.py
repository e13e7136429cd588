"""Sampling: which trajectories an epoch contains, their order and their packing.

A pure function (lengths, scores, settings, seed, epoch) → index arrays. Every rank computes the same plan, so nothing is
broadcast and a resumed run needs only its step number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

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
class EpochPlan:
    """One epoch: `packs` of corpus trajectory indices, in training order."""

    packs: Packs
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        return -(-len(self.packs) // self.global_batch_size)

    def step(self, index: int) -> list[np.ndarray]:
        """The packs of global batch `index`, always `global_batch_size` of them; the last batch is filled up with empty packs."""
        start = index * self.global_batch_size
        stop = min(start + self.global_batch_size, len(self.packs))
        packs = [self.packs[p] for p in range(start, stop)]
        return packs + [np.zeros(0, np.int64)] * (self.global_batch_size - len(packs))


class Sampler:
    """Plans the epochs over a corpus.

    lengths int [n] in tokens; scores float [n] (NaN where a trajectory has none); seq_length in tokens. Raises ConfigError if
    a trajectory is longer than seq_length, DataError if the scores do not suit the quality mode.
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
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the corpus contains no trajectories.")
        longest = int(lengths.max())
        if longest > seq_length:
            raise ConfigError(
                f"data.seq_length is {seq_length}, but {int((lengths > seq_length).sum())} of {len(lengths)} trajectories are "
                f"longer (up to {longest} tokens). Raise data.seq_length, or shard the corpus with --max-tokens {seq_length}."
            )
        if quality.mode != "none":
            missing = int(np.isnan(scores).sum())
            if missing:
                raise DataError(
                    f"data.quality.mode is {quality.mode}, but {missing} of {len(scores)} trajectories have no score. "
                    "Shard the corpus again with --score-field, or use data.quality.mode: none."
                )
            if quality.mode in ("sample", "weight") and (scores.min() < 0 or scores.sum() <= 0):
                raise DataError(
                    f"data.quality.mode {quality.mode} needs scores ≥ 0 with a positive sum; found {scores.min():g} … {scores.max():g}."
                )
            if quality.mode == "thresholds" and not (scores >= min(quality.thresholds)).any():
                raise DataError(
                    f"no trajectory reaches the lowest of data.quality.thresholds, {min(quality.thresholds):g}."
                )
        self.lengths, self.scores = lengths, scores
        self.seq_length, self.packing = seq_length, packing
        self.global_batch_size, self.quality, self.seed = global_batch_size, quality, seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._steps: dict[int, int] = {}

    def _epoch(self, epoch: int) -> EpochPlan:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
        ids = rng.permutation(self._population(rng))
        if self.packing == "none":
            packs = one_per_pack(len(ids))
        else:
            packed = best_fit(self.lengths[ids], self.seq_length)
            order = rng.permutation(len(packed))  # best fit places the longest first
            sizes = np.diff(packed.offsets)[order]
            offsets = np.concatenate([[0], np.cumsum(sizes)])
            # Gather the packs in the new order: start of each pack plus 0 … size−1 within it.
            items = np.repeat(packed.offsets[:-1][order] - offsets[:-1], sizes) + np.arange(len(ids))
            packs = Packs(offsets, packed.items[items])
        return EpochPlan(Packs(packs.offsets, ids[packs.items]), self.global_batch_size)

    def _population(self, rng: np.random.Generator) -> np.ndarray:
        n = len(self.lengths)
        if self.quality.mode == "sample":
            return rng.choice(n, size=n, p=self.scores / self.scores.sum())
        if self.quality.mode == "thresholds":
            times = sum((self.scores >= c).astype(np.int64) for c in self.quality.thresholds)
            return np.repeat(np.arange(n), times)
        return np.arange(n)

    def trajectory_weights(self, ids: np.ndarray) -> np.ndarray:
        """Loss weights s_i of trajectories `ids`, float32 [len(ids)]."""
        if self.quality.mode == "weight":
            return self.scores[ids].astype(np.float32)
        return np.ones(len(ids), dtype=np.float32)

    def steps_in(self, epoch: int) -> int:
        # Best fit needs the same number of packs for the same lengths in any order; only sampling changes the lengths.
        planned = epoch if self.quality.mode == "sample" else 0
        if planned not in self._steps:
            self._steps[planned] = self.epoch(planned).num_steps
        return self._steps[planned]

    def total_steps(self, epochs: int | None, max_steps: int | None) -> int:
        """Number of steps of a run that ends after `epochs` or `max_steps`, whichever comes first."""
        if epochs is None:
            assert max_steps is not None
            return max_steps
        total = 0
        for epoch in range(epochs):
            total += self.steps_in(epoch)
            if max_steps is not None and total >= max_steps:
                return max_steps
        return total

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch) of global step `step`, all counted from 0."""
        epoch = 0
        while step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def packs_at(self, step: int) -> list[np.ndarray]:
        """The packs of global step `step`: `global_batch_size` arrays of trajectory indices."""
        epoch, index = self.locate(step)
        return self.epoch(epoch).step(index)
