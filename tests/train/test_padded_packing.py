"""Packing for context parallelism: no row is longer than planned, and a run keeps the packs that it began with."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train import setup
from megatron_iwsft.train.check import check
from megatron_iwsft.train.continuation import check_same_run
from megatron_iwsft.train.sampling import make_sampler
from tests.support import tiny

SEQ_LENGTH, CONTEXT = 128, 4
LENGTHS = [17 + (i * 37) % 40 for i in range(60)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return tiny.token_corpus(tmp_path_factory.mktemp("padded"), LENGTHS)


def config(corpus: Corpus, *overrides: str) -> Config:
    text = f"""
run: {{name: x, dir: {corpus.directory.parent}/run}}
model: {{config: {tiny.model_config()}}}
data: {{corpus: {corpus.directory}, seq_length: {SEQ_LENGTH}, global_batch_size: 4, epochs: 1}}
objective: {{name: sft}}
parallel: {{context: {CONTEXT}}}
"""
    return parse_config(text, list(overrides), where="test")


def longest_row(corpus: Corpus, settings: Config) -> int:
    """Tokens of the longest row of an epoch, padded for context parallelism."""
    sampler = make_sampler(settings, Mixture.of({"": corpus}))
    shape = RowShape.of(tensor=1, context=CONTEXT, row_length=SEQ_LENGTH, packed_multiple=settings.packed_multiple)
    builder = BatchBuilder(corpus, sampler, shape, micro_batch_size=1)
    steps = range(sampler.epoch(0).num_steps)
    rows = [batch for step in steps for batch in builder.at_step(step)]
    assert sum(int((np.unique(row.trajectory) >= 0).sum()) for row in rows) == len(corpus)
    return max(row.tokens.numel() for row in rows)


def test_no_row_is_longer_than_planned(corpus: Corpus) -> None:
    assert longest_row(corpus, config(corpus)) == SEQ_LENGTH
    assert longest_row(corpus, config(corpus, "data.pad_to=1")) > SEQ_LENGTH, "padding does make rows longer"


def test_packs_are_the_same_at_every_degree_that_divides_pad_to(corpus: Corpus) -> None:
    mixture = Mixture.of({"": corpus})
    packs = [
        make_sampler(config(corpus, "data.pad_to=8", f"parallel.context={context}"), mixture).epoch(0).packs.items
        for context in (1, 2, 4)
    ]
    assert np.array_equal(packs[0], packs[1]) and np.array_equal(packs[0], packs[2])


def continued(corpus: Corpus, now: Config, earlier: dict[str, Any]) -> None:
    run: Any = check(now, world_size=8)
    info: Any = type(
        "Info",
        (),
        dict(directory=Path("step-1"), config=earlier, objective=None, adapter=None, corpora={}, host={}, step=1),
    )
    check_same_run(run, info)


def test_a_run_is_not_continued_with_other_packs(corpus: Corpus) -> None:
    before = config(corpus, "parallel.context=2").model_dump()
    with pytest.raises(ConfigError, match=r"multiples of 8 tokens, but step-1 .* multiples of 4\. Set data.pad_to: 4"):
        continued(corpus, config(corpus), before)
    continued(corpus, config(corpus, "data.pad_to=4"), before)
    del before["data"]["pad_to"]  # of a version that packed without padding
    with pytest.raises(ConfigError, match=r"Set data.pad_to: 1"):
        continued(corpus, config(corpus, "parallel.context=2"), before)
    continued(corpus, config(corpus, "data.pad_to=1"), before)


def test_masks_that_are_too_large_are_refused(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check(config(corpus), world_size=8)
    setup._refuse_dense_masks(checked, variable_length=False)
    monkeypatch.setattr(setup, "LARGEST_LOCAL_MASK", 56 * 7)
    with pytest.raises(ConfigError, match=r"a trajectory of 56 tokens.*Install Transformer Engine"):
        setup._refuse_dense_masks(checked, variable_length=False)


def started(platform: Any, settings: Config, largest_mask: int) -> str:
    """What `start` raises with another limit on masks."""
    setup.LARGEST_LOCAL_MASK = largest_mask
    try:
        setup.start(check(settings, world_size=platform.world_size))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parallel
def test_a_job_with_masks_that_are_too_large_does_not_start(corpus: Corpus) -> None:
    model = tiny.model_config("mistral", sliding_window=8)
    windows = config(corpus, "parallel.context=1", f"model.config={json.dumps(model)}")
    (refused,) = run_distributed(started, 1, windows, 56 * 56)
    assert "has a trajectory of 56 tokens, for which attention without Transformer Engine would need a mask" in refused


@pytest.mark.parametrize(
    ("dtype", "head_dim", "refused"), [("bf16", 16, False), ("bf16", 20, True), ("fp32", 16, True)]
)
def test_attention_without_masks_is_for_some_dtypes_and_head_sizes(
    dtype: str, head_dim: int, refused: bool, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model_config("mistral", sliding_window=8, head_dim=head_dim)
    overrides = ("parallel.context=1", f"model.config={json.dumps(model)}", f"precision.dtype={dtype}")
    checked = check(config(corpus, *overrides), world_size=1)
    monkeypatch.setattr(setup, "LARGEST_LOCAL_MASK", 1)
    with pytest.raises(ConfigError, match="a mask of") if refused else nullcontext():
        setup._refuse_dense_masks(checked, variable_length=True)


def test_trimmed_rows_end_with_their_last_trajectory(corpus: Corpus) -> None:
    settings = config(corpus, "parallel.context=1")
    shape = RowShape.of(tensor=1, context=1, row_length=SEQ_LENGTH, trimmed=True)
    (first, *_) = BatchBuilder(
        corpus, make_sampler(settings, Mixture.of({"": corpus})), shape, micro_batch_size=1
    ).at_step(0)
    assert first.tokens.numel() == corpus.lengths[first.trajectory.numpy()].sum()
    assert (first.trajectory >= 0).all(), "no filler"
