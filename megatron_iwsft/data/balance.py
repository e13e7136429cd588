"""Dealing the packs of a global batch to data-parallel ranks, so that no rank waits for another that has more to compute.

Costs are integers: every rank deals for itself, and all must come to the same result, on different CPUs too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Lengths of segments, int64 [n], in tokens → what each costs to compute, int64 [n], in any unit.
SegmentCosts = Callable[[np.ndarray], np.ndarray]


def pack_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum over each pack, int64 [P]: of the first counts[0] of `values` (int), of the next counts[1] … A pack may be empty."""
    totals, ends = np.concatenate([[0], np.cumsum(values, dtype=np.int64)]), np.cumsum(counts)
    return totals[ends] - totals[ends - counts]


def pack_costs(
    lengths: np.ndarray, counts: np.ndarray, capacity: int, costs: SegmentCosts, *, piece: int
) -> np.ndarray:
    """The cost of each pack, int64 [P], with filler up to `capacity` tokens, in segments of `piece` tokens and what is left.

    lengths int [·]: of the segments of all packs; counts int [P]: segments of each pack.
    """
    pieces, rest = np.divmod(np.maximum(capacity - pack_sums(lengths, counts), 0), piece)
    return pack_sums(costs(lengths), counts) + pieces * costs(np.array([piece])) + costs(rest)


def deal(costs: np.ndarray, *, ranks: int) -> np.ndarray:
    """Deal packs, as many to each rank: int64 [ranks, P / ranks], each row the packs of one rank in the order of its micro-batches.

    costs int64 [P], P a multiple of `ranks`. Packs are sorted by cost and dealt in rounds, in each of which the rank with the smallest
    sum so far gets the most costly pack. So the ranks' sums are even, for which they wait at the end of a step; and so are packs of
    one round, for which ranks wait that exchange tokens in every layer (expert parallelism).
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    above_least = costs - costs.min()
    out, sums = np.empty((ranks, len(rounds)), np.int64), np.zeros(ranks, np.int64)
    for number, packs in enumerate(rounds):
        by_sum = np.argsort(sums, kind="stable")
        out[by_sum, number] = packs
        sums[by_sum] += above_least[packs]
    return out
