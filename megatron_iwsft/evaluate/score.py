"""Negative log-likelihood of a corpus under an exported model, computed with `transformers` only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.utils.progress import progress


@dataclass(frozen=True)
class CorpusScore:
    """nll: mean over the `tokens` trained tokens of all `trajectories`, in nats."""

    nll: float
    tokens: int
    trajectories: int


def score_corpus(model_directory: str | Path, corpus_directory: str | Path) -> CorpusScore:
    """Mean negative log-likelihood of a corpus's trained tokens under a Hugging Face model, in fp32: as the nll of an evaluation set.

    Raises CheckpointError if transformers cannot load the model, DataError if the corpus was tokenized with another tokenizer.
    """
    corpus = Corpus.open(corpus_directory)
    if load_tokenizer(model_directory).fingerprint != corpus.manifest["tokenizer"]["fingerprint"]:
        raise DataError(
            f"{corpus_directory} was tokenized with a different tokenizer than that of {model_directory}. "
            "Shard the records again with --tokenizer of the model."
        )
    complaints = corpus.damage(show_progress=True)
    if complaints:
        raise DataError(
            f"{corpus_directory} does not match its manifest. Restore it, or shard the records again:\n  "
            + "\n  ".join(complaints)
        )
    model, _ = load_in_transformers(model_directory)
    total, count = 0.0, 0
    for i in progress(range(len(corpus)), "scoring", unit="trajectories"):
        with torch.no_grad():
            logprobs = hugging_face_logprobs(model, corpus.tokens(i).tolist())
        trained = corpus.mask(i)[1:] == 1
        total -= float(logprobs.double().numpy()[trained].sum())
        count += int(np.count_nonzero(trained))
    return CorpusScore(total / count, count, len(corpus))
