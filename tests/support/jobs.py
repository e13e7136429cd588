"""Several cases in one job of processes, such that a failing case does not hide the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_iwsft.testing import run_distributed


def run_each(
    function: Callable[..., Any], world_size: int, cases: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any | Exception]:
    """Call function(platform, *arguments) for each case in turn, in one job, which starts faster than a job per case.

    Returns for each case what the first rank's call returned, or the error of the case that ended the job. The cases after it run in a
    new job. `result` raises such an error.
    """
    outcomes: dict[str, Any | Exception] = {}
    while remaining := {name: arguments for name, arguments in cases.items() if name not in outcomes}:
        with tempfile.TemporaryDirectory() as directory:
            try:
                run_distributed(_run_each, world_size, function, remaining, Path(directory))
                error = None
            except AssertionError as raised:
                error = raised
            started = sum(1 for _ in Path(directory).glob("started-*"))
            for number, name in enumerate(remaining):
                if (path := Path(directory) / f"result-{number}").exists():
                    outcomes[name] = torch.load(path, weights_only=False)
                elif error is not None and (
                    number == started - 1 or not started
                ):  # none started: the job itself failed
                    outcomes[name] = error
    return outcomes


def _run_each(
    platform: Any, function: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]], directory: Path
) -> None:
    for number, arguments in enumerate(cases.values()):
        if platform.rank == 0:
            (directory / f"started-{number}").touch()
        dist.barrier()  # no rank may fail in a case that the first rank has not started
        value = function(platform, *arguments)
        dist.barrier()  # all ranks have finished the case
        if platform.rank == 0:
            torch.save(value, directory / f"writing-{number}")
            (directory / f"writing-{number}").rename(directory / f"result-{number}")


def result(outcomes: Mapping[str, Any | Exception], name: str) -> Any:
    """A case's result. Raises the error of one that failed."""
    outcome = outcomes[name]
    if isinstance(outcome, Exception):
        raise AssertionError(f"{name} failed:\n{outcome}") from outcome
    return outcome
