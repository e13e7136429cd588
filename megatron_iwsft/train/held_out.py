"""Sets of held-out trajectories: opened and checked before a job starts, then evaluated during training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_iwsft.config.data import MixtureCorpus, QualityConfig
from megatron_iwsft.config.evaluation import EvaluationSet
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import EpochPlan, Sampler
from megatron_iwsft.errors import DataError
from megatron_iwsft.train.sampling import make_sampler


@dataclass(frozen=True)
class HeldOutSet:
    """One of `evaluation.sets`.

    sampler  over all trajectories of its corpus, without quality
    plan     those that are evaluated, once each
    """

    name: str
    mixture: Mixture
    sampler: Sampler
    plan: EpochPlan

    @property
    def corpus(self) -> Corpus:
        return self.mixture.corpora[0]

    @staticmethod
    def open(entry: EvaluationSet, config: Config, trained: Corpus) -> HeldOutSet:
        """Raises DataError if its corpus does not go with `trained`, one of the training corpora, or does not fit into a row."""
        corpus = Corpus.open(entry.corpus)
        where = f"evaluation.sets: {entry.name}: {corpus.directory}"
        if corpus.manifest["tokenizer"] != trained.manifest["tokenizer"]:
            raise DataError(
                f"{where} was made with a different tokenizer than {trained.directory}. Shard it again with the same one."
            )
        if not len(corpus):
            raise DataError(f"{where} contains no trajectories. Leave the set out, or shard records that are kept.")
        data = config.data.model_copy(
            update={
                "quality": QualityConfig(),
                "corpus": None,
                "corpora": [MixtureCorpus(corpus=entry.corpus, name=entry.name)],
            }
        )
        mixture = Mixture.of({entry.name: corpus})
        sampler = make_sampler(config.model_copy(update={"data": data}), mixture)
        return HeldOutSet(entry.name, mixture, sampler, sampler.plan_of(_drawn(len(corpus), entry.max_trajectories)))


def _drawn(size: int, most: int | None) -> np.ndarray:
    """Which of `size` trajectories are evaluated, in order: independent of `run.seed`, so that runs can be compared."""
    if most is None or most >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, size=most, replace=False))
