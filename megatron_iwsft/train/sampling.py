"""The training corpora and the sampler that a config describes."""

from __future__ import annotations

from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Part, Quality, Sampler
from megatron_iwsft.data.scores import normalized_by_source, thresholds_in_scores


def open_mixture(config: Config) -> Mixture:
    """The corpora that a config trains on. Raises DataError."""
    return Mixture.open({entry.label: entry.corpus for entry in config.data.mixture})


def make_sampler(config: Config, mixture: Mixture) -> Sampler:
    """The sampler that a config's `data` section describes, over its corpora."""
    data, scores = config.data, mixture.scores
    if data.quality.normalize:
        scores = normalized_by_source(scores, mixture.sources())
    multiple = config.packed_multiple
    return Sampler(
        mixture.lengths if multiple == 1 else -(-mixture.lengths // multiple) * multiple,
        scores,
        seq_length=data.seq_length,
        packing=data.packing,
        global_batch_size=data.global_batch_size,
        quality=Quality(data.quality.mode, thresholds_in_scores(data.quality.thresholds, scores)),
        seed=config.run.seed,
        parts=[
            Part(entry.label, len(corpus), entry.epochs or 1.0, entry.weight)
            for entry, corpus in zip(data.mixture, mixture.corpora, strict=True)
        ],
    )
