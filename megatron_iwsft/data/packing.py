"""Packing: which trajectories share a sequence. Works on index arrays only, not on tokens.

`best_fit` is best-fit decreasing over lengths. Lengths are small integers, so all trajectories of one length are placed
together: the cost grows with the number of distinct (length, free space) pairs, not with the number of trajectories.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_iwsft.errors import DataError


@dataclass(frozen=True)
class Packs:
    """Pack p holds items[offsets[p]:offsets[p+1]]; items are indices into the `lengths` that were packed.

    offsets int64 [P+1], items int32 or int64 [n].
    """

    offsets: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]

    def take(self, packs: np.ndarray) -> Packs:
        """Some of the packs (int64 [n]), in the order given."""
        sizes = np.diff(self.offsets)[packs]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        # Start of each pack plus 0 … size−1 within it.
        items = np.repeat(self.offsets[:-1][packs] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Packs(offsets, self.items[items])

    def followed_by(self, other: Packs) -> Packs:
        """These packs and then the others, of the same `lengths`."""
        return Packs(
            np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]),
            np.concatenate([self.items, other.items]),
        )


def one_per_pack(n: int) -> Packs:
    """One trajectory per sequence, as in the paper's experiments."""
    return Packs(offsets=np.arange(n + 1, dtype=np.int64), items=np.arange(n, dtype=np.int64))


def best_fit(lengths: np.ndarray, capacity: int, *, order: np.random.Generator | None = None) -> Packs:
    """Pack items of `lengths` (int [n], in tokens, each ≤ capacity) into sequences of `capacity` by best-fit decreasing.

    Deterministic. Items of equal length are placed in the order given, so shuffling before packing changes which
    trajectories share a sequence. With `order`, the packs come in a random order; else those with the longest items come first.
    Raises DataError if an item is longer than the capacity.
    """
    n = len(lengths)
    if n == 0:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64))
    placements = list(_placements(length_counts(lengths, capacity), capacity))
    num_packs = max(first + count for first, count in placements)
    sizes = np.zeros(num_packs, np.int64)
    for first, count in placements:
        sizes[first : first + count] += 1
    packs = np.arange(num_packs) if order is None else order.permutation(num_packs)
    offsets = np.concatenate([[0], np.cumsum(sizes[packs])])
    free = np.empty(num_packs, np.int64)  # where the next item of each pack goes
    free[packs] = offsets[:-1]
    # Sorting 16-bit numbers is several times as fast.
    by_length = np.argsort((capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int64), kind="stable")
    items, at = np.empty(n, index_dtype(n)), 0
    for first, count in placements:
        where = free[first : first + count]
        items[where] = by_length[at : at + count]
        where += 1
        at += count
    return Packs(offsets, items)


def packs_needed(counts: np.ndarray, capacity: int) -> int:
    """How many packs `best_fit` makes of items of which counts[l] have length l."""
    return max((first + count for first, count in _placements(counts, capacity)), default=0)


def length_counts(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """How many items have each length, int64 [capacity + 1]. Raises DataError if one is longer than `capacity`."""
    longest = int(lengths.max(initial=0))
    if longest > capacity:
        raise DataError(
            f"a trajectory of {longest} tokens does not fit in a sequence of {capacity}. "
            "Raise data.seq_length, or shard with --max-tokens."
        )
    return np.bincount(lengths, minlength=capacity + 1)


def index_dtype(n: int) -> np.dtype:
    """Of indices below n."""
    return np.dtype(np.int32 if n <= np.iinfo(np.int32).max else np.int64)


def _placements(counts: np.ndarray, capacity: int) -> Iterator[tuple[int, int]]:
    """Best-fit decreasing for items of which counts[l] have length l: (first, n), the next n items go to packs first … first + n − 1.

    Items come in the order of their lengths, the longest first.
    """
    open_packs: dict[
        int, list[tuple[int, int]]
    ] = {}  # free space → runs of packs with exactly that much left, as (first, n)
    free_spaces: list[int] = []  # sorted keys of open_packs

    def put(first: int, n: int, free: int) -> None:
        if free not in open_packs:
            open_packs[free] = []
            insort(free_spaces, free)
        open_packs[free].append((first, n))

    num_packs = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            where = bisect_left(free_spaces, length)
            if where < len(free_spaces):
                free = free_spaces[where]
                first, n = open_packs[free].pop()
                if not open_packs[free]:
                    del open_packs[free], free_spaces[where]
                if n > left:
                    put(first + left, n - left, free)
                    n = left
            else:
                free, first = capacity, num_packs
                n = max(1, -(-left // max(1, capacity // max(1, length))))
                num_packs += n
            yield first, n
            left -= n
            put(first, n, free - length)


def efficiency(lengths: np.ndarray, packs: Packs, capacity: int) -> float:
    """Fraction of the packed positions that hold real tokens, 0 … 1."""
    return float(lengths[packs.items].sum()) / (len(packs) * capacity) if len(packs) else 1.0
