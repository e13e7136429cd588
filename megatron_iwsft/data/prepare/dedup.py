"""Deduplication: exact by content hash, near-duplicates by MinHash signature."""

from __future__ import annotations

import numpy as np

from megatron_iwsft.data.prepare.filters import NUM_PERMUTATIONS, SEED, import_library


class HashSet:
    """A set of 128-bit keys in one open-addressing table: 23 to 46 bytes per key, with batched lookup and insertion."""

    def __init__(self) -> None:
        self._table = np.zeros((1 << 12, 2), np.uint64)
        self._used = np.zeros(1 << 12, bool)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Insert keys, uint64 [n, 2]. Returns bool [n], True where the key is new (of equal keys, the first)."""
        while (self._size + len(keys)) * 10 > len(self._table) * 7:
            self._grow()
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in input order
        ordered = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        new = np.zeros(len(keys), bool)
        candidates = order[first]
        new[candidates] = self._insert(keys[candidates])
        return new

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        """`add` for distinct keys, into a table with enough room."""
        new = np.zeros(len(keys), bool)
        waiting = np.arange(len(keys))
        slot = (keys[:, 0] & np.uint64(len(self._table) - 1)).astype(np.int64)
        while len(waiting):
            at = slot[waiting]
            free = ~self._used[at]
            claim = waiting[free]
            self._table[slot[claim]] = keys[claim]  # if several keys claim one slot, the last one gets it
            self._used[slot[claim]] = True
            placed = (self._table[at] == keys[waiting]).all(axis=1)
            new[waiting[free & placed]] = True
            waiting = waiting[~placed]
            slot[waiting] = (slot[waiting] + 1) % len(self._table)
        self._size += int(new.sum())
        return new

    def _grow(self) -> None:
        old = self._table[self._used]
        self._table = np.zeros((2 * len(self._table), 2), np.uint64)
        self._used = np.zeros(len(self._table), bool)
        self._size = 0
        for start in range(0, len(old), 1 << 20):
            self._insert(old[start : start + (1 << 20)])


class NearDuplicates:
    """Finds near-duplicates among the trajectories added so far: MinHash signatures in a locality-sensitive index, by `rensa`.

    The index compares bands of a signature's values to find candidate pairs. Bands are as wide as possible while a pair at the
    threshold still becomes a candidate with probability 99 %. A candidate is a near-duplicate if its estimated similarity
    reaches the threshold.
    """

    def __init__(self, threshold: float) -> None:
        library = import_library("rensa", "near-duplicate removal")
        widths = [w for w in (1, 2, 4, 8, 16, 32) if 1 - (1 - threshold**w) ** (NUM_PERMUTATIONS // w) >= 0.99]
        self._index = library.RMinHashDeduplicator(
            threshold, NUM_PERMUTATIONS, True, NUM_PERMUTATIONS // widths[-1], SEED
        )
        self._new_minhash = library.RMinHash
        self._size = 0

    def find_or_add(self, name: str, signature: bytes) -> str | None:
        """The name of the earliest near-duplicate of this trajectory; if there is none, add it and return None."""
        minhash = self._new_minhash(NUM_PERMUTATIONS, SEED)
        minhash.__setstate__(signature)
        similar = self._index.get_duplicates(minhash)
        if similar:
            return min(similar, key=lambda key: int(key.split(":", 1)[0])).split(":", 1)[1]
        self._index.add(f"{self._size}:{name}", minhash)
        self._size += 1
        return None
