"""Preprocessing of quality scores for the sampler: normalisation per source, percentile thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_iwsft.data.metadata import Sources
from megatron_iwsft.errors import DataError


def normalized_by_source(scores: np.ndarray, sources: Sources) -> np.ndarray:
    """Scores scaled to 0 … 1 within each source (1 if all scores of a source are equal). Raises DataError if a score is missing."""
    if np.isnan(scores).any():
        raise DataError(
            f"data.quality.normalize needs a score for every trajectory; {int(np.isnan(scores).sum())} have none. Shard the corpus "
            "again with --score-field."
        )
    out = np.ones_like(scores)
    low, high = np.full(len(sources.names), np.inf), np.full(len(sources.names), -np.inf)
    np.minimum.at(low, sources.numbers, scores)
    np.maximum.at(high, sources.numbers, scores)
    low, high = low[sources.numbers], high[sources.numbers]
    np.divide(scores - low, high - low, out=out, where=high > low)
    return out


def thresholds_in_scores(given: Sequence[float | str], scores: np.ndarray) -> tuple[float, ...]:
    """Thresholds as scores: a percentile such as "90%" is replaced by its score, a number is kept."""
    known = scores[~np.isnan(scores)] if any(isinstance(x, str) for x in given) else scores[:0]
    if len(known) == 0:
        return tuple(float(x) for x in given if not isinstance(x, str))
    return tuple(float(np.percentile(known, float(x[:-1]))) if isinstance(x, str) else float(x) for x in given)
