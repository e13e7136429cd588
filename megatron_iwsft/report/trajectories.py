"""The trajectories with the largest and the smallest importance weights, token by token.

Computed from a run's newest Hugging Face export and the reference log-probs in its corpus: training itself does not keep them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.report.run_record import RunRecord
from megatron_iwsft.utils.progress import progress

_LONGEST = 4096  # tokens that are scored
_SHOWN = 400  # tokens that are shown


@dataclass(frozen=True)
class ShadedToken:
    """log_ratio: log policy − log reference of a trained token, in nats; None if the token is not trained."""

    text: str
    log_ratio: float | None

    @property
    def shade(self) -> str:
        """CSS class: p1 … p4 more likely than under the reference, n1 … n4 less likely; empty below a tenth of a nat."""
        if self.log_ratio is None:
            return "context"
        size = sum(abs(self.log_ratio) > edge for edge in (0.1, 0.5, 1.0, 2.0))
        return f"{'p' if self.log_ratio > 0 else 'n'}{size}" if size else ""


@dataclass(frozen=True)
class WeighedTrajectory:
    """mean, total: of the log-ratio over its trained tokens; weight: the importance ratio policy / reference, exp(total)."""

    identifier: str
    source: str
    score: float | None
    mean: float
    total: float
    tokens: list[ShadedToken]
    cut: int

    @property
    def weight(self) -> str:
        return f"{math.exp(self.total):.3g}" if abs(self.total) < 700 else f"exp({self.total:.0f})"


@dataclass(frozen=True)
class Extremes:
    """Of one run: `looked_at` of its corpus's trajectories were scored at export `step`, by the mean or the sum of their log-ratios."""

    run: str
    step: str
    by: Literal["mean", "sum"]
    looked_at: int
    trajectories: int
    largest: list[WeighedTrajectory]
    smallest: list[WeighedTrajectory]


def extreme_trajectories(run: RunRecord, count: int, *, shown: int = 4) -> Extremes:
    """Score `count` trajectories of the run's corpus, evenly spread, and take those with the extreme log-ratios: sums
    if the run's objective is of level trajectory, else means.

    Raises DataError if the run has no export, or its corpus no reference log-probs; CheckpointError if transformers cannot load the export.
    """
    import torch

    from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers

    export = _newest_export(run)
    corpus = _corpus(run)
    reference = _reference(run, corpus)
    model, _ = load_in_transformers(export)
    by: Literal["mean", "sum"] = "sum" if run.settings.get("objective.level") == "trajectory" else "mean"
    scored: list[tuple[float, int, np.ndarray]] = []
    chosen = np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int)).tolist()
    with torch.inference_mode():
        for i in progress(chosen, f"weights in {run.name}", unit="trajectories"):
            ids = corpus.tokens(i)[:_LONGEST]
            trained = corpus.mask(i)[: len(ids)] == 1
            if not trained[1:].any():
                continue
            policy = np.concatenate([[0.0], hugging_face_logprobs(model, ids.tolist()).numpy()])
            ratios = np.where(trained, policy - reference(i)[: len(ids)], np.nan)
            ratios[0] = np.nan
            scored.append((float(np.nansum(ratios) if by == "sum" else np.nanmean(ratios)), i, ratios))
    scored.sort(key=lambda row: row[0])
    meta = corpus.meta(["id", "source", "score"] if "source" in corpus.meta().column_names else ["id", "score"])
    decode = corpus.tokenizer().decode

    def weighed(row: tuple[float, int, np.ndarray]) -> WeighedTrajectory:
        _, i, ratios = row
        return _weighed(corpus.tokens(i), ratios, meta.slice(i, 1).to_pylist()[0], decode)

    half = min(shown, len(scored) // 2)
    largest, smallest = scored[::-1][:half], scored[:half]
    return Extremes(
        run.name,
        export.name,
        by,
        len(scored),
        len(corpus),
        [weighed(r) for r in largest],
        [weighed(r) for r in smallest],
    )


def _weighed(ids: np.ndarray, ratios: np.ndarray, meta: dict[str, Any], decode: Any) -> WeighedTrajectory:
    # Long prompts are cut at the front: the trained tokens matter.
    first = max(0, min(int(np.flatnonzero(~np.isnan(ratios))[0]) - _SHOWN // 4, len(ratios) - _SHOWN))
    last = min(len(ratios), first + _SHOWN)
    tokens = [
        ShadedToken(decode([int(ids[k])]), None if math.isnan(ratios[k]) else float(ratios[k]))
        for k in range(first, last)
    ]
    return WeighedTrajectory(
        identifier=str(meta.get("id", "")),
        source=str(meta.get("source") or ""),
        score=meta.get("score"),
        mean=float(np.nanmean(ratios)),
        total=float(np.nansum(ratios)),
        tokens=tokens,
        cut=len(ids) - len(tokens),
    )


def _newest_export(run: RunRecord) -> Path:
    exports = sorted((run.directory / "hf").glob("step-*"))
    if not exports:
        raise DataError(
            f"{run.directory} has no Hugging Face export, from which the weights of single trajectories are computed. Set "
            f"export.at_end=true, or run `iwsft export --checkpoint {run.directory} --output {run.directory}/hf/step-…`."
        )
    return exports[-1]


def _corpus(run: RunRecord) -> Corpus:
    directory = run.settings.get("data.corpus")
    if not isinstance(directory, str):
        raise DataError(
            f"{run.directory}/config.yaml names no single data.corpus: leave out --trajectories for this run."
        )
    return Corpus.open(directory)


def _reference(run: RunRecord, corpus: Corpus) -> Any:
    from megatron_iwsft.reference.sidecar import Sidecar, complete_sidecars

    found = complete_sidecars(corpus)
    if len(found) != 1:
        has = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"weights of single trajectories need the reference log-probs of exactly one model in {corpus.directory}; it has {has}. "
            "Run `iwsft reference` with the run's config, or leave out --trajectories."
        )
    return Sidecar.at(corpus, found[0])


def shades() -> Sequence[tuple[str, str]]:
    """(CSS class, meaning) for the legend."""
    return [
        ("n4", "less likely than under the reference, by more than 2 nats"),
        ("n2", "by 0.5 to 1"),
        ("p2", "more likely, by 0.5 to 1"),
        ("p4", "by more than 2 nats"),
    ]
