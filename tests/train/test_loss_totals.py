"""Sums of a global batch are reduced exactly once, and read only afterwards."""

from __future__ import annotations

import pytest
import torch

from megatron_iwsft.objectives.functions import Settings, Trajectories, iw_sft, local_segment_sum
from megatron_iwsft.objectives.loss import LossSums, micro_batch_loss
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.normalization import LossTotals


def micro_batch() -> LossSums:
    mask, segment = torch.ones(4), torch.zeros(4, dtype=torch.long)
    t = Trajectories(
        logprobs=torch.full((4,), -1.0, requires_grad=True),
        proposal=torch.full((4,), -1.0),
        reference=torch.full((4,), -1.5),
        mask=mask,
        segment=segment,
        lengths=torch.tensor([4.0]),
        quality=torch.ones(1),
        segment_sum=local_segment_sum(segment, 1),
    )
    return micro_batch_loss(iw_sft, t, Settings())


def tokens_of_two_ranks(platform) -> float:
    parallel = platform.parallel()
    totals = LossTotals(iw_sft, platform.device, dp_cp=parallel.dp_cp, pp=parallel.pp)
    totals.add(micro_batch())
    for read in (totals.metrics, lambda: totals["tokens"]):
        with pytest.raises(RuntimeError, match="call `reduce` on all ranks first"):
            read()
    totals.reduce()
    for again in (totals.reduce, lambda: totals.finalize([]), lambda: totals.add(micro_batch())):
        with pytest.raises(RuntimeError, match="reduced already"):
            again()
    assert totals.metrics()["trained_tokens"] == totals["tokens"]
    return totals["tokens"]


@pytest.mark.parallel
def test_totals_are_reduced_once() -> None:
    assert run_distributed(tokens_of_two_ranks, 2) == [8.0, 8.0]
