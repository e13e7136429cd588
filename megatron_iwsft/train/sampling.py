"""The training corpora, the sampler that a config describes, and the groups of trajectories whose losses are reported."""

from __future__ import annotations

import numpy as np

from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Part, Quality, Sampler
from megatron_iwsft.data.scores import normalized_by_source, thresholds_in_scores
from megatron_iwsft.objectives.breakdown import Breakdown, break_down
from megatron_iwsft.utils.node_arrays import Arrays, node_arrays


def open_mixture(config: Config) -> Mixture:
    """The corpora that a config trains on. Raises DataError."""
    return Mixture.open({entry.label: entry.corpus for entry in config.data.mixture})


def make_sampler(config: Config, mixture: Mixture) -> Sampler:
    """The sampler that a config's `data` section describes, over its corpora."""
    data, scores, identity = config.data, mixture.scores, mixture.identity
    if data.quality.normalize:
        scores = node_arrays(
            f"normalized scores of {identity}",
            lambda: {"scores": normalized_by_source(mixture.scores, mixture.sources())},
        )["scores"]
        identity += " with normalized scores"
    return Sampler(
        mixture.lengths,
        scores,
        seq_length=data.seq_length,
        packing=data.packing,
        global_batch_size=data.global_batch_size,
        quality=Quality(data.quality.mode, thresholds_in_scores(data.quality.thresholds, scores)),
        seed=config.run.seed,
        pad_to=config.packed_multiple,
        group_by_cost=data.group_by_cost,
        identity=identity,
        parts=[
            Part(entry.label, len(corpus), entry.epochs or 1.0, entry.weight)
            for entry, corpus in zip(data.mixture, mixture.corpora, strict=True)
        ],
    )


def loss_groups(mixture: Mixture) -> Breakdown | None:
    """By score, source and corpus; None if nothing distinguishes trajectories."""

    def compute() -> Arrays:
        corpora = dict(zip(mixture.names, map(len, mixture.corpora), strict=True))
        found = break_down(mixture.scores, mixture.sources(), corpora)
        return {} if found is None else {"names": np.array(found.names), "of": found.of}

    arrays = node_arrays(f"groups of {mixture.names} {mixture.identity}", compute)
    return Breakdown(arrays["names"].tolist(), arrays["of"]) if arrays else None
