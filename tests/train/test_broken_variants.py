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
from megatron_iwsft.testing import run_distributed
from tests.train.test_layouts import TOLERANCE, Case, Loss, expected, relative_error, run_cases
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


def run_variants(platform, corpus_dir: str) -> dict[str, list]:
    """For each variant: (loss, gradients) with the mistake, and after it was removed."""
    out = {}
    for name, (target, mistake, case) in VARIANTS.items():
        with patch(target, mistake):
            broken = run_cases(platform, corpus_dir, [case], [LOSS])
        fixed = run_cases(platform, corpus_dir, [case], [LOSS])
        out[name] = [next(iter((x or {None: None}).values())) for x in (broken, fixed)]
    return out


@pytest.mark.parallel
@pytest.mark.numerics
def test_each_mistake_is_detected(corpus: Corpus) -> None:
    answers = run_distributed(run_variants, 2, str(corpus.directory))[0]
    print(f"\n{'mistake':50} {'loss off by':>11} {'worst gradient':>14}   {'removed':>9}")
    for name, (broken, fixed) in answers.items():
        want_loss, want = expected(str(corpus.directory), "best_fit", False, False, LOSS)
        worst = [max(relative_error(g[n], want[n]) for n in want) for _, g in (broken, fixed)]
        off = abs(broken[0][0] - want_loss[0]) / abs(want_loss[0])
        print(f"{name:50} {off:11.1e} {worst[0]:14.1e}   {worst[1]:9.1e}")
        assert worst[0] > 100 * TOLERANCE, name
        assert worst[1] <= TOLERANCE, name
