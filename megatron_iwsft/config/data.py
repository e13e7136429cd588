"""The section `data` of a config: corpora, quality, packing, batch sizes, the length of the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from megatron_iwsft.config.section import PositiveFloat, PositiveInt, Section
from megatron_iwsft.objectives.functions import Origin


class QualityConfig(Section):
    """How the quality scores of trajectories enter training."""

    mode: Literal["none", "sample", "weight", "thresholds"] = "none"
    """What scores are used for.
    none: nothing. sample: draw trajectories in proportion to score, with replacement.
    weight: multiply a trajectory's loss by its score. thresholds: repeat a trajectory once per threshold that its score reaches."""
    thresholds: list[float | str] = []
    """For mode thresholds. A number is a score; "90%" is the 90th percentile of the corpus's scores."""
    normalize: bool = False
    """Scale the scores of each source to 0 … 1 first."""

    @model_validator(mode="after")
    def _thresholds_given(self) -> QualityConfig:
        if (self.mode == "thresholds") != bool(self.thresholds):
            raise ValueError("mode thresholds needs a list of thresholds; other modes take none")
        for threshold in self.thresholds:
            if isinstance(threshold, str) and not (
                re.fullmatch(r"\d+(\.\d+)?%", threshold) and float(threshold[:-1]) <= 100
            ):
                raise ValueError(f"a threshold must be a number, or a percentile from 0% to 100%; found {threshold!r}")
        return self


class MixtureCorpus(Section):
    """One corpus of a mixture."""

    corpus: str
    """Corpus directory, made by `iwsft shard`."""
    name: str | None = None
    """Of the corpus in metrics and messages. null: the directory's name."""
    epochs: PositiveFloat | None = None
    """Passes over the corpus in each epoch of the run. 2.5: every trajectory twice, half of them a third time. null: one."""
    weight: PositiveFloat | None = None
    """Instead of epochs: the share of each epoch's trajectories that come from this corpus, relative to the other weights."""

    @property
    def label(self) -> str:
        """Its name, given or not."""
        return self.name or Path(self.corpus).absolute().name


class Data(Section):
    """Corpus or mixture of corpora, packing, batch sizes, and the length of the run."""

    corpus: str | None = None
    """Corpus directory, made by `iwsft shard`. Set this or corpora."""
    corpora: list[MixtureCorpus] = []
    """Several corpora in one run: a list of mappings with the keys corpus (a directory), name, and epochs or weight.
    name: of the corpus in metrics and messages; by default the directory's name.
    epochs: passes over the corpus in each epoch of the run; 2.5 is every trajectory twice, half of them a third time. By default 1.
    weight: the share of each epoch's trajectories, relative to the other weights. All corpora have weights, or none has."""
    seq_length: PositiveInt
    """Tokens per sequence. A longer trajectory in the corpus is an error: raise this, or shard with --max-tokens."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: pack several trajectories into one sequence, with attention kept within each. none: one trajectory per sequence."""
    pad_to: PositiveInt | None = None
    """Pack as if each trajectory were padded to a multiple of so many tokens. null: what context parallelism pads to (2 × parallel.context,
    or 1 without it), so that no packed sequence is longer than seq_length. Set it for packs that are the same at several context-parallel
    degrees; below 2 × parallel.context, sequences can become longer than seq_length."""
    micro_batch_size: PositiveInt = 1
    """Sequences per micro-batch on each data-parallel rank."""
    global_batch_size: PositiveInt = 1
    """Sequences per optimizer step, over all micro-batches and data-parallel ranks."""
    epochs: PositiveInt | None = None
    """End the run after this many passes over the corpus, or over the mixture as `corpora` defines it.
    At least one of epochs and max_steps must be set; the one reached first ends the run."""
    max_steps: PositiveInt | None = None
    """End the run after this many optimizer steps."""
    balance: bool = True
    """Deal the sequences of each step to the data-parallel ranks by their cost (matmuls and attention), so that ranks have equally much
    to compute. A step's sequences stay the same, and so does its gradient, up to the order of summation.
    False: deal them as they come."""
    group_by_cost: bool = False
    """Make each step of sequences with similarly much attention, so that ranks wait even less; steps come in random order. Unlike balance,
    this changes training: the trajectories of a step are alike in length, and the gradients of successive steps differ more."""
    quality: QualityConfig = QualityConfig()
    drawn_from: Origin = "other"
    """What the trajectories were sampled from, at temperature 1; decides which metrics are defined.
    other: anything but the reference policy, or unknown. reference: the reference policy, and nothing was filtered out.
    reference_filtered: the reference policy, and a filter kept those that count as success."""
    verify: Literal["full", "sample", "none"] = "full"
    """What is checked of the corpus when a run starts, beyond its indices; the ranks share the work.
    full: the SHA-256 of every file, token ids and masks. sample: the same of at most 64 blocks of 64 MiB, chosen by `run.seed`;
    for corpora that take minutes to read. none: nothing; token ids and masks are then checked only as they are read."""

    @model_validator(mode="after")
    def _has_corpora(self) -> Data:
        if (self.corpus is None) == (not self.corpora):
            raise ValueError("needs corpus (one directory) or corpora (a list), not both")
        weighted = [entry.label for entry in self.corpora if entry.weight is not None]
        counted = [entry.label for entry in self.corpora if entry.epochs is not None]
        unweighted = [entry.label for entry in self.corpora if entry.weight is None]
        if weighted and (counted or unweighted):
            raise ValueError(
                f"corpora: {weighted[0]} has a weight, {(counted or unweighted)[0]} "
                f"{'has epochs' if counted else 'has none'}. Give all corpora a weight, or none"
            )
        labels = [entry.label for entry in self.corpora]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"corpora: two have the name {twice}. Set name for one of them")
        return self

    @property
    def mixture(self) -> list[MixtureCorpus]:
        """The corpora, also where there is only one."""
        return self.corpora if self.corpus is None else [MixtureCorpus(corpus=self.corpus)]

    @model_validator(mode="after")
    def _has_an_end(self) -> Data:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("needs epochs or max_steps: the run would have no end")
        return self
