"""Packs dealt by cost: each to one rank, ranks and micro-batches with equally much to compute, the same batch as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_iwsft.data.balance import deal, pack_costs
from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from tests.support import tiny


def unequal_costs(packs: int, seed: int = 0) -> np.ndarray:
    return (1e6 * np.random.default_rng(seed).lognormal(0, 0.5, packs).clip(0.3, 3)).astype(np.int64)


@pytest.mark.parametrize(("packs", "ranks"), [(256, 64), (6, 3), (5, 5), (8, 1)])
def test_each_pack_goes_to_one_rank_and_each_rank_gets_as_many(packs: int, ranks: int) -> None:
    dealt = deal(unequal_costs(packs), ranks=ranks)
    assert dealt.shape == (ranks, packs // ranks)
    assert sorted(dealt.ravel().tolist()) == list(range(packs))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_micro_batches_are_even(seed: int) -> None:
    """Ranks wait for the slowest at the end of a step, or in every micro-batch."""
    costs = unequal_costs(512, seed)
    balanced, as_they_come = costs[deal(costs, ranks=64)], costs.reshape(8, 64).T
    mean = costs.sum() / 64
    assert balanced.sum(1).max() <= 1.04 * mean < 1.3 * mean < as_they_come.sum(1).max()
    assert balanced.max(0).sum() <= 1.2 * mean < 2 * mean < as_they_come.max(0).sum()


def test_equal_packs_are_dealt_in_order() -> None:
    assert deal(np.full(6, 7), ranks=2).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_pack_costs_its_segments_and_its_filler() -> None:
    lengths, counts = np.array([3, 4, 10]), np.array([2, 0, 1, 0])
    assert pack_costs(lengths, counts, 10, lambda n: n * n, piece=10).tolist() == [9 + 16 + 9, 100, 100, 100]
    assert pack_costs(lengths, counts, 10, lambda n: n * n, piece=4).tolist() == [
        9 + 16 + 9,
        16 + 16 + 4,
        100,
        16 + 16 + 4,
    ]


def test_no_segment_of_filler_is_longer_than_the_longest_trajectory(corpus: Corpus) -> None:
    options: dict = dict(seq_length=128, packing="none", global_batch_size=8, quality=Quality(), seed=3)
    builder = BatchBuilder(
        corpus,
        Sampler(corpus.lengths, corpus.scores, **options),
        RowShape.of(tensor=1, context=4, row_length=1000),
        micro_batch_size=1,
    )
    batches = [*builder.from_packs([np.array([0])]), *builder.from_packs([np.zeros(0, np.int64)])]
    for batch in batches:
        assert batch.tokens.numel() == 1000 and int(batch.cu_seqlens[-1]) == 1000
        assert batch.max_seqlen == 120, "the longest trajectory has 119 tokens"
        assert bool((batch.cu_seqlens.diff() % 8 == 0).all()), "context parallelism splits it"
        assert batch.num_segments == len(batch.lengths) == len(batch.quality) == len(batch.trajectory)
    assert [(batch.trajectory >= 0).sum() for batch in batches] == [1, 0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory: Path = tmp_path_factory.mktemp("balance")
    return tiny.token_corpus(directory, [10 + (i * 29) % 110 for i in range(50)])


def work(row: np.ndarray) -> np.ndarray:
    return row * row


def test_the_reference_is_computed_in_the_rows_of_training(corpus: Corpus) -> None:
    """`iwsft reference` takes the packs of `covering`, training those of the first epoch: each rank has the same rows in both."""
    options: dict[str, Any] = dict(seq_length=128, packing="best_fit", global_batch_size=4, seed=3)
    sampler = Sampler(corpus.lengths, corpus.scores, quality=Quality(), **options)
    covering, shape = sampler.covering(), RowShape.of(tensor=1, context=1, row_length=128)
    for rank in range(2):
        builder = BatchBuilder(corpus, sampler, shape, micro_batch_size=1, data_rank=rank, data_size=2, costs=work)
        for step in range(sampler.steps_in(0)):
            training, reference = builder.at_step(step), builder.from_packs(covering.step(step))
            assert [row.trajectory.tolist() for row in training] == [row.trajectory.tolist() for row in reference]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(training, reference, strict=True))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_holds_the_same_trajectories_dealt_evenly(micro_batch_size: int, packing: str, corpus: Corpus) -> None:
    ranks, micro_batches = 4, 2
    sampler = Sampler(
        corpus.lengths,
        corpus.scores,
        seq_length=128,
        packing=packing,
        global_batch_size=ranks * micro_batches * micro_batch_size,
        quality=Quality(),
        seed=3,
    )
    row_length = 128 * micro_batch_size if packing == "best_fit" else None

    def step(index: int, costs) -> list[list[Batch]]:
        """The micro-batches of each rank."""
        builders = [
            BatchBuilder(
                corpus,
                sampler,
                RowShape.of(tensor=1, context=1, row_length=row_length),
                micro_batch_size=micro_batch_size,
                data_rank=rank,
                data_size=ranks,
                costs=costs,
            )
            for rank in range(ranks)
        ]
        return [builder.at_step(index) for builder in builders]

    def spread(found: list[list[Batch]]) -> int:
        """Of the ranks' work, without filler where several packs share a row."""
        segments = [
            [
                batch.cu_seqlens.diff()[: None if micro_batch_size == 1 else (batch.trajectory >= 0).sum()]
                for batch in rank
            ]
            for rank in found
        ]
        sums = [sum(int(work(sizes.numpy().astype(int)).sum()) for sizes in rank) for rank in segments]
        return max(sums) - min(sums)

    gained = 0
    for index in range(sampler.steps_in(0)):
        dealt, as_they_come = step(index, work), step(index, None)
        expected = sorted(np.concatenate(sampler.packs_at(index)).tolist())
        for found in (dealt, as_they_come):
            assert {len(rank) for rank in found} == {micro_batches}
            assert (
                sorted(i for rank in found for batch in rank for i in batch.trajectory.tolist() if i >= 0) == expected
            )
        gained += spread(as_they_come) - spread(dealt)
    assert gained > 0
