"""Loss by score, by source and by corpus: which groups each trajectory of a corpus belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_iwsft.data.batch import Batch

_BUCKETS = 4
_MOST_SOURCES = 20


@dataclass(frozen=True)
class Breakdown:
    """Groups of trajectories. names: of all G groups; of: int64 [groupings, trajectories], each trajectory's group in each grouping."""

    names: list[str]
    of: Tensor

    def to(self, device: torch.device) -> Breakdown:
        return Breakdown(self.names, self.of.to(device))

    def zero_sums(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def sums(self, batch: Batch, logprobs: Tensor) -> Tensor:
        """float64 [G, 2]: Σ −ℓ_t and the number of trained tokens of each group, over this rank's part of a micro-batch.

        logprobs  float32 [T] of the policy
        """
        out = self.zero_sums(logprobs.device)
        trajectory = batch.trajectory[batch.segment]  # filler, −1, has no trained tokens
        values = torch.stack([-logprobs * batch.mask, batch.mask], dim=1).double()
        for kind in self.of:
            out.index_add_(0, kind[trajectory], values)
        return out

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Mean negative log-prob of each group that has tokens."""
        return {name: nll / tokens for name, (nll, tokens) in zip(self.names, sums.tolist(), strict=True) if tokens}


def break_down(
    scores: np.ndarray, sources: Sequence[str], corpora: Mapping[str, int] | None = None
) -> Breakdown | None:
    """Group by score (each value if there are few, else quartiles), by source and by corpus; None if nothing distinguishes trajectories.

    corpora: name → number of trajectories, in their order.
    """
    names: list[str] = []
    kinds = []
    for labels, numbers in (_by_score(scores), _by_source(sources), _by_corpus(corpora or {})):
        if len(labels) > 1:
            kinds.append(torch.from_numpy(numbers.astype(np.int64) + len(names)))
            names += labels
    return Breakdown(names, torch.stack(kinds)) if kinds else None


def _by_corpus(sizes: Mapping[str, int]) -> tuple[list[str], np.ndarray]:
    return [f"nll/corpus {name}" for name in sizes], np.repeat(np.arange(len(sizes)), list(sizes.values()))


def _by_score(scores: np.ndarray) -> tuple[list[str], np.ndarray]:
    if np.isnan(scores).any():
        return [], scores
    values = np.unique(scores)
    if len(values) <= _BUCKETS:
        return [f"nll/score {v}" for v in _shortest(values)], np.searchsorted(values, scores)
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, _BUCKETS + 1)))
    labels = [f"nll/score {low} to {high}" for low, high in itertools.pairwise(_shortest(edges))]
    return labels, np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, len(labels) - 1)


def _shortest(values: np.ndarray) -> list[str]:
    """With as few digits, at least six, as distinguish the values."""
    texts = ([f"{v:.{digits}g}" for v in values] for digits in range(6, 18))
    return next(found for found in texts if len(set(found)) == len(values))


def _by_source(sources: Sequence[str]) -> tuple[list[str], np.ndarray]:
    values, numbers, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:_MOST_SOURCES]
    labels = [f"nll/source {values[i]}" for i in largest]
    place = np.full(len(values), len(labels))
    place[largest] = np.arange(len(largest))
    return labels + (["nll/source others"] if len(values) > len(largest) else []), place[numbers]
