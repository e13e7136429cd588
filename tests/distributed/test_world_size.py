"""A layout must fit the number of processes."""

from __future__ import annotations

import pytest
import torch

from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import ConfigError


def test_the_expert_degree_must_divide_the_ranks_of_a_stage() -> None:
    with pytest.raises(ConfigError, match=r"expert 7 does not divide the 2 ranks .* expert can be 1, 2\.$"):
        ParallelLayout.for_world(2, expert=7)
    assert ParallelLayout.for_world(8, pipeline=2, expert=4).data == 4


def test_a_platform_takes_a_layout_of_its_own_size_or_degrees() -> None:
    platform = Platform(device=torch.device("cpu"), rank=0, world_size=2)
    with pytest.raises(ConfigError, match=r"a layout of 4 processes; this job has 2\. Start 4"):
        platform.parallel(ParallelLayout(data=4))
    with pytest.raises(TypeError, match="a layout or degrees, not both; found a layout and tensor"):
        platform.parallel(ParallelLayout(data=2), tensor=2)
    with pytest.raises(ConfigError, match="does not divide the world size of 2 processes"):
        platform.parallel(tensor=4)
