"""Estimated costs of references against the number of parameters."""

from __future__ import annotations

import pytest

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.reference.cost import reference_costs
from tests.support import tiny


def test_costs_follow_from_the_number_of_parameters() -> None:
    arch = Architecture.from_hf(tiny.model_config(vocab_size=384), where="test")
    parameters = 0
    for shape in shapes(arch).values():
        size = 1
        for n in shape:
            size *= n
        parameters += size
    costs = {c.kind: c for c in reference_costs(arch, ParallelLayout(), tokens=1000, epochs=5)}
    assert costs["live"].memory == 2 * parameters and costs["live"].flops == pytest.approx(2 / 6)
    assert costs["cached"].flops == pytest.approx(2 / 30) and costs["cached"].disk == 4000
    assert costs["cached"].memory == 0
    assert costs["proposal ema"].memory == 6 * parameters
    assert costs["live, offload"].host == 2 * parameters
    halves = {c.kind: c for c in reference_costs(arch, ParallelLayout(pipeline=2), tokens=1000, epochs=5)}
    assert halves["live"].memory < costs["live"].memory
