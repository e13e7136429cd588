"""A process's gloo groups share one device: each adds one thread, its worker."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.testing import run_distributed

pytestmark = pytest.mark.parallel


def threads_of_groups(platform: Any) -> tuple[int, list[float]]:
    """(threads that four more groups add, sums over them of collectives that are under way together)."""
    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group(backend="gloo") for _ in range(4)]
    values = [torch.full((5000,), float(i + platform.rank)) for i in range(len(groups))]
    works = [dist.all_reduce(v, group=g, async_op=True) for v, g in zip(values, groups, strict=True)]
    for work in reversed(works):
        work.wait()
    added = len(os.listdir("/proc/self/task")) - before
    for group in groups:
        dist.destroy_process_group(group)
    return added, [v.mean().item() for v in values]


def test_a_group_adds_one_thread() -> None:
    for added, sums in run_distributed(threads_of_groups, 2):
        assert added == 4
        assert sums == [1.0, 3.0, 5.0, 7.0]
