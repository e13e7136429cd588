"""Loss by score and by source, and the scores that the sampler uses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.data.metadata import Sources
from megatron_iwsft.data.scores import normalized_by_source, thresholds_in_scores
from megatron_iwsft.errors import DataError
from megatron_iwsft.objectives.breakdown import break_down


def batch(trajectory: list[int], labels: list[int], segment: list[int]) -> Batch:
    n = len(labels)
    return Batch(
        tokens=torch.zeros(1, n, dtype=torch.int64),
        labels=torch.tensor([labels]),
        position_ids=torch.zeros(1, n, dtype=torch.int64),
        segment=torch.tensor(segment),
        reference=None,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        max_seqlen=n,
        lengths=torch.ones(len(trajectory)),
        quality=torch.ones(len(trajectory)),
        trajectory=torch.tensor(trajectory),
    )


def test_each_token_counts_towards_its_score_and_its_source() -> None:
    groups = break_down(
        np.array([0.0, 1.0, 1.0]), Sources.of(["math/train.jsonl", "code/train.jsonl", "math/train.jsonl"])
    )
    assert groups is not None
    row = batch([2, 0, -1], [5, 6, IGNORE, 7, IGNORE], [0, 0, 1, 1, 2])  # the last segment is filler
    row = replace(row, groups=torch.from_numpy(groups.of[:, [2, 0, 0]].astype(np.int64)))
    sums = groups.sums(row, {"nll": torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0]), "tokens": row.mask})
    assert groups.values(sums) == {
        "nll/score 0": 4.0,
        "nll/score 1": 1.5,
        "nll/source math/train.jsonl": pytest.approx(7 / 3),
    }


def test_one_group_is_none_and_many_scores_become_quartiles() -> None:
    assert break_down(np.full(3, np.nan), Sources.of(["a"] * 3)) is None
    many = break_down(np.arange(100) / 1e6, Sources.of(["a"] * 100))
    assert many is not None and len(set(many.names)) == 4
    assert np.bincount(many.of[0]).tolist() == [25, 25, 25, 25]


def test_scores_are_scaled_by_source_and_percentiles_become_scores() -> None:
    scores = normalized_by_source(np.array([2.0, 4.0, 3.0, 7.0, 7.0]), Sources.of(["a", "a", "a", "b", "b"]))
    assert scores.tolist() == [0.0, 1.0, 0.5, 1.0, 1.0]
    with pytest.raises(DataError, match="1 have none"):
        normalized_by_source(np.array([1.0, np.nan]), Sources.of(["a", "a"]))
    assert thresholds_in_scores([0.25, "90%"], np.arange(11.0)) == (0.25, 9.0)
