"""FLOPs lost because data-parallel ranks wait for the one with most to compute: tools/bench/balance.py [--ranks 64 --micro-batches 4]

The project's sampler packs trajectories of three kinds; the packs of each step are given to ranks as they come, as `data.balance` deals
them, and by Karmarkar and Karp's method with the cost formula of verl (24,576 n + n² per trajectory of n tokens, for every model). The
last column is `data.balance` again, in steps of similar packs (`data.group_by_cost`).
Rows cost what a model computes on them: the layers' matmuls on every position, attention within each trajectory and within the filler.

`at the end` is the share of the FLOPs of all ranks that is lost where ranks wait once per step (pure data parallelism), `in lockstep`
where they wait in every micro-batch (expert parallelism over data-parallel ranks). Nothing is timed.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np

QWEN2_5_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN3_235B_A22B = QWEN2_5_32B | {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
MODELS = {"Qwen2.5-32B": QWEN2_5_32B, "Qwen3-235B-A22B": QWEN3_235B_A22B}

# A rule gives the packs of a step, by their costs, to ranks: int64 [ranks, micro-batches].
Rule = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel degree")
    parser.add_argument("--micro-batches", type=int, default=4, help="per rank and step")
    parser.add_argument("--steps", type=int, default=24, help="steps of each mix")
    args = parser.parse_args()

    from megatron_iwsft.hf.architecture import Architecture

    print(f"{args.ranks} data-parallel ranks, {args.micro_batches} micro-batches each, {args.steps} steps")
    print("lost at the end / in lockstep")
    columns = ("as they come", "data.balance", "Karmarkar-Karp, verl's formula", "with data.group_by_cost")
    print(f"{'mix':26} {'model':16} " + " ".join(f"{column:>30}" for column in columns))
    for mix, (lengths, seq_length) in mixes(args.ranks * args.micro_batches * args.steps).items():
        size = args.ranks * args.micro_batches
        steps = packed(lengths, seq_length, size, args.steps)
        grouped = packed(lengths, seq_length, size, args.steps, group_by_cost=True)
        for name, config in MODELS.items():
            arch = Architecture.from_hf(config, where=name)
            found = losses(steps, seq_length, arch, args.ranks)
            found.append(losses(grouped, seq_length, arch, args.ranks)[1])
            print(f"{mix:26} {name:16} " + " ".join(f"{f'{end:.2%} / {lockstep:.2%}':>30}" for end, lockstep in found))


def mixes(packs: int) -> dict[str, tuple[np.ndarray, int]]:
    """Lengths of at least as many trajectories as fill `packs` sequences, and the length of these, by name."""
    rng = np.random.default_rng(0)
    return {
        "like GSM8K, at 2k": (rng.gamma(7.5, 26, 12 * packs).astype(np.int64).clip(40, 700), 2048),
        "like s1K, 1k-32k, at 32k": (rng.lognormal(8.9, 0.6, 5 * packs).astype(np.int64).clip(1000, 32768), 32768),
        "1k-128k, at 128k": (rng.lognormal(9.6, 0.9, 9 * packs).astype(np.int64).clip(1000, 131_072), 131_072),
    }


def packed(
    lengths: np.ndarray, seq_length: int, packs: int, steps: int, *, group_by_cost: bool = False
) -> list[list[np.ndarray]]:
    """The lengths in each of `packs` packs of each step."""
    from megatron_iwsft.data.sampler import Quality, Sampler

    scores = np.ones(len(lengths))
    sampler = Sampler(
        lengths,
        scores,
        seq_length=seq_length,
        packing="best_fit",
        global_batch_size=packs,
        quality=Quality(),
        seed=1,
        group_by_cost=group_by_cost,
    )
    plan = sampler.epoch(0)
    assert len(plan.packs) >= packs * steps, "too few trajectories"
    return [[lengths[pack] for pack in plan.step(step)] for step in range(steps)]


def losses(steps: list[list[np.ndarray]], seq_length: int, arch, ranks: int) -> list[tuple[float, float]]:
    """Of each rule: the shares of all FLOPs lost by waiting once per step, and in every micro-batch."""
    from megatron_iwsft.data.balance import deal, pack_costs
    from megatron_iwsft.model.flops import multiply_adds

    def costs_of(packs: list[np.ndarray], capacity: int, costs: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return pack_costs(
            np.concatenate(packs), np.array([len(pack) for pack in packs]), capacity, costs, piece=seq_length
        )

    rules: list[Callable[[list[np.ndarray], np.ndarray], np.ndarray]] = [
        lambda packs, costs: np.arange(len(packs)).reshape(-1, ranks).T,
        lambda packs, costs: deal(costs, ranks=ranks),
        lambda packs, costs: karmarkar_karp(costs_of(packs, 0, lambda n: 24_576 * n + n * n), ranks),
    ]
    totals = np.zeros(
        (len(rules), 3)
    )  # the FLOPs, and those of as many ranks as slow as the slowest, both ways of waiting
    for packs in steps:
        costs = costs_of(packs, seq_length, partial(multiply_adds, arch))
        for number, rule in enumerate(rules):
            dealt = costs[rule(packs, costs)].astype(float)
            totals[number] += [dealt.sum(), ranks * dealt.sum(1).max(), ranks * dealt.max(0).sum()]
    return [(1 - useful / end, 1 - useful / lockstep) for useful, end, lockstep in totals.tolist()]


def karmarkar_karp(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Karmarkar and Karp's largest differencing method for `ranks` sets of equal size: int64 [ranks, P / ranks], costly packs first.

    Starts from partial solutions of `ranks` similar packs, one in each set; combines the two with the largest differences between
    their sets, the most costly set of one with the least costly of the other, until one is left.
    """
    order = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    ties = itertools.count()
    heap = [_entry([(int(costs[p]), [p]) for p in group.tolist()], next(ties)) for group in order]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = (heapq.heappop(heap)[2] for _ in range(2))
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        heapq.heappush(heap, _entry(merged, next(ties)))
    sets = np.array([packs for _, packs in heap[0][2]])
    return np.take_along_axis(sets, np.argsort(-costs[sets], axis=1, kind="stable"), axis=1)


def _entry(sets: list[tuple[int, list[int]]], tie: int) -> tuple[int, int, list[tuple[int, list[int]]]]:
    """For the heap: the largest difference first. Sets are sorted by their sum, the largest first."""
    ordered = sorted(sets, key=lambda entry: -entry[0])
    return ordered[-1][0] - ordered[0][0], tie, ordered


if __name__ == "__main__":
    main()
