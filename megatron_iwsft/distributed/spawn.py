"""Jobs of CPU processes started from another process: for tools that need Megatron-Core without CUDA, for tests and benchmarks.

Megatron-Core runs on CPU only with process-wide stand-ins for `torch.cuda` (cpu_backend.py), which a caller's process must not get.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_iwsft.distributed.context import DeviceChoice, start, stop
from megatron_iwsft.errors import UserError


def run_job(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: DeviceChoice = "cpu",
    start_method: Literal["spawn", "forkserver"] = "spawn",
) -> list[Any]:
    """Call function(platform, *args) on `world_size` new processes that form one job; returns each rank's result.

    `function` must be importable (defined at a module's top level); arguments and results must pickle. A UserError of a rank is
    raised as it is; any other failure as a RuntimeError with the traceback of the rank that failed first.
    """
    # This process keeps the store, so that nobody can take its port before the job's processes start.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        context = mp.start_processes(
            _rank,
            (world_size, store.port, function, args, device, directory, dict(os.environ)),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        assert context is not None
        try:
            while not context.join():
                pass
        except Exception as error:
            failures = [torch.load(path, weights_only=False) for path in sorted(Path(directory).glob("failure-*"))]
            failures.sort(key=lambda failure: "PeerError" in failure[1])  # those that only lost their peers come last
            if failures and isinstance(failures[0][0], UserError):
                raise failures[0][0] from None
            raise RuntimeError(failures[0][1] if failures else str(error)) from None
        return [torch.load(Path(directory) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: DeviceChoice,
    directory: str,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # a process forked by a server has the environment of the server's start
    os.environ |= environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already: connect to it
    }
    torch.set_num_threads(1)
    try:
        result = function(start(device, timeout_s=120), *args)
        torch.save(result, Path(directory) / f"result-{rank}")
        stop()
    except BaseException as error:
        text = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        torch.save((error if isinstance(error, UserError) else None, text), Path(directory) / f"failure-{rank}")
        raise
