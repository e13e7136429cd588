"""Time and memory to plan an epoch, and packing efficiency: tools/bench/sampler.py"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=10_000_000)
    parser.add_argument("--seq-length", type=int, default=22528)
    parser.add_argument("--corpus", help="also measure the packing of this corpus, at --seq-length")
    args = parser.parse_args()

    from megatron_iwsft.data.packing import best_fit, efficiency
    from megatron_iwsft.data.sampler import Quality, Sampler

    rng = np.random.default_rng(0)
    n = args.trajectories
    lengths = rng.lognormal(8.2, 0.8, n).astype(np.int32).clip(64, args.seq_length)
    scores = rng.random(n)
    print(
        f"{n:,} trajectories of {lengths.min()} … {lengths.max()} tokens (mean {lengths.mean():.0f}), sequences of {args.seq_length}"
    )
    base = _peak()
    for mode in ("none", "sample", "weight"):
        begin = time.perf_counter()
        sampler = Sampler(
            lengths,
            scores,
            seq_length=args.seq_length,
            packing="best_fit",
            global_batch_size=256,
            quality=Quality(mode),
            seed=1,
        )
        plan = sampler.epoch(0)
        elapsed = time.perf_counter() - begin
        share = efficiency(lengths, plan.packs, args.seq_length)
        print(
            f"  quality {mode:<6}  {elapsed:5.1f} s, {len(plan.packs):,} sequences, {share:.2%} real tokens; "
            f"peak {_peak():,} MiB in total ({base:,} before)"
        )
        del sampler, plan
    for name, some, capacity in _distributions(rng):
        packs = best_fit(some, capacity)
        least = lower_bound(some, capacity)
        print(
            f"  {name} at {capacity}: {efficiency(some, packs, capacity):.2%} real tokens; {len(packs):,} sequences, lower bound "
            f"{least:,} ({some.sum() / (least * capacity):.2%})"
        )
    if args.corpus:
        from megatron_iwsft.data.corpus import Corpus
        from megatron_iwsft.data.prepare.inspect import Packing

        print(f"  {args.corpus}: {Packing.of(Corpus.open(args.corpus).lengths, args.seq_length)}")


def _distributions(rng: np.random.Generator) -> list[tuple[str, np.ndarray, int]]:
    short = rng.gamma(7.5, 26, 7473).astype(np.int64).clip(40, 700)
    traces = rng.lognormal(8.9, 0.6, 20_000).astype(np.int64).clip(1000, 22_528)
    long = rng.integers(8_000, 22_001, 20_000)
    return [
        ("lengths like GSM8K's", short, 2048),
        ("reasoning traces, log-normal, 1k to 22k", traces, 22_528),
        ("long traces, uniform, 8k to 22k", long, 22_528),
    ]


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """Lower bound on the number of sequences of any packing (Martello and Toth's L2).

    Each item longer than half a sequence needs its own; smaller items that do not fit into the remaining space need further ones.
    """
    best = -(-int(lengths.sum()) // capacity)
    for least in np.unique(lengths[lengths <= capacity // 2]).tolist():
        alone = int((lengths > capacity - least).sum())
        large = lengths[(lengths > capacity // 2) & (lengths <= capacity - least)]
        small = int(lengths[(lengths >= least) & (lengths <= capacity // 2)].sum())
        room = len(large) * capacity - int(large.sum())
        best = max(best, alone + len(large) + max(0, -(-(small - room) // capacity)))
    return best


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
