"""What has been seen earlier in a corpus: contents by their hash, near-duplicates by their MinHash signatures."""

from __future__ import annotations

import numpy as np

from megatron_iwsft.data.prepare.filters import NUM_PERMUTATIONS, SEED, import_library


class HashSet:
    """A set of 128-bit keys in one open-addressed table: 23 to 46 bytes a key, looked up and inserted many at a time."""

    def __init__(self) -> None:
        self._table = np.zeros((1 << 12, 2), np.uint64)
        self._used = np.zeros(1 << 12, bool)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Insert keys, uint64 [n, 2]; returns bool [n], True for those that were not yet there (the first of equal ones)."""
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
        """As `add`, for keys that differ from each other and a table with room."""
        new = np.zeros(len(keys), bool)
        waiting = np.arange(len(keys))
        slot = (keys[:, 0] & np.uint64(len(self._table) - 1)).astype(np.int64)
        while len(waiting):
            at = slot[waiting]
            free = ~self._used[at]
            claim = waiting[free]
            self._table[slot[claim]] = keys[claim]  # of several that claim one slot, the last remains
            self._used[slot[claim]] = True
            here = (self._table[at] == keys[waiting]).all(axis=1)
            new[waiting[free & here]] = True
            waiting = waiting[~here]
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
    """Trajectories seen, by the words that they have in common: MinHash signatures in a locality-sensitive index, by `rensa`.

    The index looks at bands of a signature's values. They are as wide as possible while a pair at the threshold is still
    looked at with a probability of 99 %; such a pair then counts if its estimated similarity reaches the threshold.
    """

    def __init__(self, threshold: float) -> None:
        library = import_library("rensa", "near-duplicate removal")
        widths = [w for w in (1, 2, 4, 8, 16, 32) if 1 - (1 - threshold**w) ** (NUM_PERMUTATIONS // w) >= 0.99]
        self._index = library.RMinHashDeduplicator(
            threshold, NUM_PERMUTATIONS, True, NUM_PERMUTATIONS // widths[-1], SEED
        )
        self._empty = library.RMinHash
        self._size = 0

    def find_or_add(self, name: str, signature: bytes) -> str | None:
        """The name of the earliest trajectory that resembles this one, or None, in which case this one is added."""
        minhash = self._empty(NUM_PERMUTATIONS, SEED)
        minhash.__setstate__(signature)
        alike = self._index.get_duplicates(minhash)
        if alike:
            return min(alike, key=lambda key: int(key.split(":", 1)[0])).split(":", 1)[1]
        self._index.add(f"{self._size}:{name}", minhash)
        self._size += 1
        return None
