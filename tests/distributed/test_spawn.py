"""Jobs of processes started from another process: results by rank, and the failure that is raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.errors import ConfigError, UserError
from megatron_iwsft.testing import run_distributed

pytestmark = pytest.mark.parallel


def job(function: Any, *arguments: Any) -> list[Any]:
    """`run_job` on two processes, forked from the server of `run_distributed`."""
    return run_job(function, 2, *arguments, start_method="forkserver")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The first job starts the server, with its imports."""
    run_distributed(sum_of_ranks, 2, 0)


def sum_of_ranks(platform: Any, plus: int) -> tuple[int, int]:
    total = torch.tensor([platform.rank + plus])
    dist.all_reduce(total)
    return platform.rank, int(total)


def fail_on(platform: Any, ranks: dict[int, Exception]) -> None:
    """Raise on some ranks; the others wait for them in a collective."""
    if platform.rank in ranks:
        raise ranks[platform.rank]
    dist.barrier()


def exit_silently(platform: Any) -> None:
    import os

    if platform.rank == 1:
        os._exit(7)
    dist.barrier()


def test_results_are_returned_by_rank() -> None:
    assert job(sum_of_ranks, 10) == [(0, 21), (1, 21)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_of_a_rank_is_raised_as_itself(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 3") as error:
        job(fail_on, {rank: ConfigError("parallel.tensor is 3")})
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_exception_is_raised_with_the_traceback_of_its_rank(rank: int) -> None:
    with pytest.raises(RuntimeError, match="ValueError: out of range") as error:
        job(fail_on, {rank: ValueError("out of range")})
    text = str(error.value)
    assert text.startswith(f"rank {rank} of 2:\nTraceback (most recent call last)")
    assert "in fail_on" in text


def test_a_rank_that_exits_silently_ends_the_job() -> None:
    with pytest.raises(RuntimeError):
        job(exit_silently)


def test_run_distributed_raises_every_failure_as_an_assertion_error() -> None:
    for error in (ConfigError("parallel.tensor is 3"), ValueError("out of range")):
        with pytest.raises(AssertionError, match=str(error)):
            run_distributed(fail_on, 2, {1: error})
