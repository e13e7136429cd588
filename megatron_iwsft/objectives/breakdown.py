"""Metrics by score, by source and by corpus: which groups each trajectory of a corpus belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.metadata import Sources
from megatron_iwsft.objectives.metrics import METRICS, Metric

_BUCKETS = 4
_MOST_SOURCES = 20
_NLL = next(metric for metric in METRICS if metric.name == "nll")


@dataclass(frozen=True)
class Breakdown:
    """Groups of trajectories, and the metrics that are reported of each.

    names    of all G groups, such as "source math"
    of       int16 [groupings, trajectories], each trajectory's group in each grouping
    metrics  M ratios of two sums over tokens
    """

    names: list[str]
    of: np.ndarray
    metrics: tuple[Metric, ...] = (_NLL,)

    def zero_sums(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self.names), 2 * len(self.metrics), dtype=torch.float64, device=device)

    def sums(self, batch: Batch, terms: Mapping[str, Tensor]) -> Tensor:
        """float64 [G, 2M]: each metric's numerator and denominator, for each group, over this rank's part of a micro-batch.

        terms  name → per-token terms [T], as in `LossSums.terms`; the batch's `groups` are those of `of`
        """
        assert batch.groups is not None
        wanted = [name for metric in self.metrics for name in (metric.numerator, metric.denominator) if name]
        values = torch.stack([terms[name].double() for name in wanted], dim=1)
        out = self.zero_sums(values.device)
        for groups in batch.groups:  # filler has no trained tokens
            out.index_add_(0, groups[batch.segment], values)
        return out

    def values(self, sums: Tensor) -> dict[str, float]:
        """Each metric of each group that has tokens."""
        return {
            f"{metric.name}/{group}": row[2 * i] / row[2 * i + 1]
            for group, row in zip(self.names, sums.tolist(), strict=True)
            for i, metric in enumerate(self.metrics)
            if row[2 * i + 1]
        }


def break_down(
    scores: np.ndarray,
    sources: Sources,
    corpora: Mapping[str, int] | None = None,
    metrics: tuple[Metric, ...] = (_NLL,),
) -> Breakdown | None:
    """Group by score (each value if there are few, else quartiles), by source and by corpus; None if nothing distinguishes trajectories.

    corpora: name → number of trajectories, in their order.
    """
    names: list[str] = []
    kinds = []
    for labels, numbers in (_by_score(scores), _by_source(sources), _by_corpus(corpora or {})):
        if len(labels) > 1:
            kinds.append((numbers + len(names)).astype(np.int16))
            names += labels
    return Breakdown(names, np.stack(kinds), metrics) if kinds else None


def _by_corpus(sizes: Mapping[str, int]) -> tuple[list[str], np.ndarray]:
    return [f"corpus {name}" for name in sizes], np.repeat(np.arange(len(sizes)), list(sizes.values()))


def _by_score(scores: np.ndarray) -> tuple[list[str], np.ndarray]:
    if np.isnan(scores).any():
        return [], scores
    values = np.unique(scores)
    if len(values) <= _BUCKETS:
        return [f"score {v}" for v in _shortest(values)], np.searchsorted(values, scores)
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, _BUCKETS + 1)))
    labels = [f"score {low} to {high}" for low, high in itertools.pairwise(_shortest(edges))]
    return labels, np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, len(labels) - 1)


def _shortest(values: np.ndarray) -> list[str]:
    """With as few digits, at least six, as distinguish the values."""
    texts = ([f"{v:.{digits}g}" for v in values] for digits in range(6, 18))
    return next(found for found in texts if len(set(found)) == len(values))


def _by_source(sources: Sources) -> tuple[list[str], np.ndarray]:
    values, numbers = sources.names, sources.numbers
    counts = np.bincount(numbers, minlength=len(values))
    largest = np.argsort(-counts, kind="stable")[:_MOST_SOURCES]
    labels = [f"source {values[i]}" for i in largest]
    place = np.full(len(values), len(labels))
    place[largest] = np.arange(len(largest))
    return labels + (["source others"] if len(values) > len(largest) else []), place[numbers]
