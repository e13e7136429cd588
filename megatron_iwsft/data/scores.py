"""Preprocessing of quality scores for the sampler: normalisation per source, percentile thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_iwsft.errors import DataError


def normalized_by_source(scores: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """Scores scaled to 0 … 1 within each source (1 if all scores of a source are equal). Raises DataError if a score is missing."""
    if np.isnan(scores).any():
        raise DataError(
            f"data.quality.normalize needs a score for every trajectory; {int(np.isnan(scores).sum())} have none. Shard the corpus "
            "again with --score-field."
        )
    out = np.ones_like(scores)
    values, numbers = np.unique(np.asarray(sources), return_inverse=True)
    for i in range(len(values)):
        own = scores[numbers == i]
        low, high = own.min(), own.max()
        if high > low:
            out[numbers == i] = (own - low) / (high - low)
    return out


def thresholds_in_scores(given: Sequence[float | str], scores: np.ndarray) -> tuple[float, ...]:
    """Thresholds as scores: a percentile such as "90%" is replaced by its score, a number is kept."""
    known = scores[~np.isnan(scores)]
    if len(known) == 0:
        return tuple(float(x) for x in given if not isinstance(x, str))
    return tuple(float(np.percentile(known, float(x[:-1]))) if isinstance(x, str) else float(x) for x in given)
