"""Packing: which trajectories share a sequence. Works on index arrays only, not on tokens.

`best_fit` is best-fit decreasing over lengths. Lengths are small integers, so all trajectories of one length are placed
together: the cost grows with the number of distinct (length, free space) pairs, not with the number of trajectories.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from megatron_iwsft.errors import DataError


@dataclass(frozen=True)
class Packs:
    """Pack p holds items[offsets[p]:offsets[p+1]]; items are indices into the `lengths` that were packed.

    offsets int64 [P+1], items int64 [n].
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


def best_fit(lengths: np.ndarray, capacity: int) -> Packs:
    """Pack items of `lengths` (int [n], in tokens, each ≤ capacity) into sequences of `capacity` by best-fit decreasing.

    Deterministic. Items of equal length are placed in the order given, so shuffling before packing changes which
    trajectories share a sequence. Raises DataError if an item is longer than the capacity.
    """
    n = len(lengths)
    if n == 0:
        return Packs(np.zeros(1, np.int64), np.zeros(0, np.int64))
    if int(lengths.max()) > capacity:
        raise DataError(
            f"a trajectory of {int(lengths.max())} tokens does not fit in a sequence of {capacity}. "
            "Raise data.seq_length, or shard with --max-tokens."
        )
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    distinct, counts = np.unique(-lengths, return_counts=True)

    pack_of = np.empty(n, dtype=np.int64)  # for each item of `order`
    open_packs: dict[int, list[np.ndarray]] = {}  # free space → packs with exactly that much left
    free_spaces: list[int] = []  # sorted keys of open_packs

    def put(packs: np.ndarray, free: int) -> None:
        if free not in open_packs:
            open_packs[free] = []
            insort(free_spaces, free)
        open_packs[free].append(packs)

    num_packs = 0
    at = 0
    for length, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        left = count
        while left:
            where = bisect_left(free_spaces, length)
            if where < len(free_spaces):
                free = free_spaces[where]
                groups = open_packs[free]
                packs = groups.pop()
                if not groups:
                    del open_packs[free], free_spaces[where]
                if len(packs) > left:
                    put(packs[left:], free)
                    packs = packs[:left]
            else:
                free = capacity
                packs = np.arange(num_packs, num_packs + max(1, -(-left // max(1, capacity // length))))
                num_packs += len(packs)
            placed = len(packs)
            pack_of[at : at + placed] = packs
            at += placed
            left -= placed
            put(packs, free - length)

    by_pack = np.argsort(pack_of, kind="stable")
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return Packs(offsets=offsets, items=order[by_pack])


def efficiency(lengths: np.ndarray, packs: Packs, capacity: int) -> float:
    """Fraction of the packed positions that hold real tokens, 0 … 1."""
    return float(lengths[packs.items].sum()) / (len(packs) * capacity) if len(packs) else 1.0
