"""Jobs of CPU processes started from another process: for tools that need Megatron-Core without CUDA, for tests and benchmarks.

Megatron-Core runs on CPU only with process-wide stand-ins for `torch.cuda` (cpu_backend.py), which a caller's process must not get.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing as mp

from megatron_iwsft.distributed.context import DeviceChoice, start, stop
from megatron_iwsft.distributed.loopback import ADDRESS, keep_to_loopback, loopback_store
from megatron_iwsft.errors import UserError


def run_job(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: DeviceChoice = "cpu",
    start_method: Literal["spawn", "forkserver"] = "spawn",
    timeout_s: float = 3600.0,
    threads: int | None = None,
) -> list[Any]:
    """Call function(platform, *args) on `world_size` new processes that form one job; returns each rank's result.

    `function` must be importable (defined at a module's top level); arguments and results must pickle. timeout_s: for which a
    collective waits for the slowest rank. threads: of each process; None shares out this process's cores. A UserError or OSError of
    a rank is raised as it is; any other failure as a RuntimeError with the traceback of the rank that failed first.
    """
    # This process keeps the store, so that nobody can take its port before the job's processes start.
    store = loopback_store()
    environment = dict(os.environ)
    keep_to_loopback(environment)
    job = _Job(
        world_size,
        store.port,
        device,
        timeout_s,
        threads or max(1, len(os.sched_getaffinity(0)) // world_size),
        environment,
    )
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as directory:
        context = mp.start_processes(
            _rank,
            (job, work, directory),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        assert context is not None
        try:
            while not context.join():
                pass
        except Exception as error:
            paths = sorted(Path(directory).glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
            failures = [torch.load(path, weights_only=False) for path in paths]  # first the rank that failed first
            failures.sort(key=lambda failure: "PeerError" in failure[1])  # those that only lost their peers come last
            if failures and failures[0][0] is not None:
                raise failures[0][0] from None
            raise RuntimeError(failures[0][1] if failures else str(error)) from None
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


@dataclass(frozen=True)
class _Job:
    """What every rank is told."""

    world_size: int
    port: int
    device: DeviceChoice
    timeout_s: float
    threads: int
    environment: dict[str, str]


def _rank(rank: int, job: _Job, work: bytes, directory: str) -> None:
    os.environ.clear()  # a process forked by a server has the environment of the server's start
    os.environ |= job.environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.world_size),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(job.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already: connect to it
    }
    torch.set_num_threads(job.threads)
    gc.freeze()  # what a server has imported is never garbage: no collection needs to look at it
    try:
        platform = start(job.device, timeout_s=job.timeout_s)
        function, args = pickle.loads(work)  # which imports Megatron-Core: after `start`
        torch.save(function(platform, *args), Path(directory) / f"result-{rank}")
        stop()
    except BaseException as error:
        text = f"rank {rank} of {job.world_size}:\n{traceback.format_exc()}"
        kept = error if isinstance(error, (UserError, OSError)) else None
        torch.save((kept, text), Path(directory) / f"partial-{rank}")
        os.rename(
            Path(directory) / f"partial-{rank}", Path(directory) / f"failure-{rank}"
        )  # it may be killed meanwhile
        raise
