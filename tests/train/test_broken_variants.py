"""The layout comparison detects four classic mistakes: each is patched in, detected, and removed again."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.objectives.functions import Objective, Settings, Trajectories, local_segment_sum
from megatron_iwsft.objectives.loss import LossSums, micro_batch_loss, sum_names
from tests.support.jobs import result, run_each
from tests.train.test_layouts import TOLERANCE, Case, Loss, expected, relative_error, run_case
from tests.train.test_layouts import corpus as corpus  # the fixture

SLICE = Batch.slice_for_context_parallel


def labels_rolled_after_the_slice(batch: Batch, rank: int, size: int) -> Batch:
    """The label of a token is the next token of this rank's slice, which need not be the next of the trajectory."""
    local = SLICE(batch, rank, size)
    rolled = torch.where(local.labels == IGNORE, IGNORE, local.tokens.roll(-1, dims=1))
    return replace(local, labels=rolled)


def mean_of_local_means(objective: Objective, trajectories: Trajectories, settings: Settings) -> LossSums:
    """Every micro-batch is divided by its own denominator, and the quotients are averaged."""
    out = micro_batch_loss(objective, trajectories, settings)
    local = out.sums[sum_names(objective).index("denominator")].clamp(min=1.0)
    sums = out.sums / local
    sums[sum_names(objective).index("denominator")] = 1.0
    return LossSums(out.loss / local, sums, out.weight_max)


def nothing(*args, **kwargs) -> None:
    """A collective that was forgotten."""


def of_this_rank_only(step, batch: Batch):
    """Sums of trajectories without the parts on other context-parallel ranks."""
    return local_segment_sum(batch.segment, batch.num_segments)


# mistake → (what it replaces, the mistake, a layout that shows it)
VARIANTS = {
    "labels rolled after the context-parallel slice": (
        "megatron_iwsft.data.batch.Batch.slice_for_context_parallel",
        labels_rolled_after_the_slice,
        Case(context=2),
    ),
    "local mean instead of global": ("megatron_iwsft.train.step.micro_batch_loss", mean_of_local_means, Case()),
    "no all-reduce in the operator's backward": ("megatron_iwsft.ops.logprob._all_reduce", nothing, Case(tensor=2)),
    "segment sum without context-parallel reduction": (
        "megatron_iwsft.train.step.TrainStep._segment_sum",
        of_this_rank_only,
        Case(context=2),
    ),
}
LOSS = Loss("iw_sft", Settings(clip=(0.2, 3.0)))


def run_variant(platform, corpus_dir: str, name: str) -> list[tuple]:
    """(losses, gradients) with the mistake, and after it was removed."""
    target, mistake, case = VARIANTS[name]
    with patch(target, mistake):
        broken = run_case(platform, corpus_dir, case, [LOSS])
    return [broken[LOSS], run_case(platform, corpus_dir, case, [LOSS])[LOSS]]


@pytest.fixture(scope="module")
def outcomes(corpus: Corpus) -> dict:
    return run_each(run_variant, 2, {name: (str(corpus.directory), name) for name in VARIANTS})


@pytest.mark.parallel
@pytest.mark.parametrize("name", VARIANTS)
def test_a_mistake_is_detected(name: str, corpus: Corpus, outcomes: dict) -> None:
    _, want = expected(str(corpus.directory), Case(), (LOSS,))[LOSS]
    broken, fixed = (max(relative_error(g[n], want[n]) for n in want) for _, g in result(outcomes, name))
    print(f"\n{name}: worst gradient off by {broken:.1e}, without the mistake {fixed:.1e}", end="")
    assert broken > 100 * TOLERANCE
    assert fixed <= TOLERANCE
