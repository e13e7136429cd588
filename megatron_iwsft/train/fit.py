"""`iwsft doctor --config`: does a run fit this machine? The plan of `--dry-run`, with memory compared and time estimated."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import DataError
from megatron_iwsft.train.plan import Plan, plan
from megatron_iwsft.utils.jsonl import read_json_lines


@dataclass(frozen=True)
class Machine:
    """gpus: on this machine. memory: bytes of the smallest GPU; without one, of the host, which its processes share."""

    gpus: int
    memory: int

    @staticmethod
    def here(device: str) -> Machine:
        """device: `run.device` of the config."""
        gpus = 0 if device == "cpu" else torch.cuda.device_count()
        if not gpus:
            return Machine(0, psutil.virtual_memory().total)
        return Machine(gpus, min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus)))


def fit(
    config: Config,
    machine: Machine,
    *,
    world_size: int,
    memory: float | None = None,
    tflops: float | None = None,
    model_config: str | None = None,
) -> Plan:
    """The plan of training, with lines `fits` and `time`. What does not fit is in `Plan.missing`.

    memory  GB per process, in place of what this machine has
    tflops  model TFLOP/s that each process attains
    """
    found = plan("train", config, world_size=world_size, model_config=model_config, allow_missing=True)
    if found.memory is not None:
        _compare_memory(found, machine, world_size, memory)
    if found.flops is not None and tflops is not None:
        hours = found.flops / (tflops * 1e12) / 3600
        found.add(
            "time",
            f"{_duration(hours)} at {tflops:g} TFLOP/s per process, {hours * world_size:,.3g} process hours in all",
        )
    elif found.flops is not None:
        found.add("time", "not estimated: state the TFLOP/s per process (--tflops), or a similar run (--like RUN_DIR)")
    return found


def _compare_memory(found: Plan, machine: Machine, world_size: int, memory: float | None) -> None:
    assert found.memory is not None
    need = found.memory.total + found.copies
    if memory is not None:
        have, what = memory * 1e9, "per process, as stated"
    elif machine.gpus:
        have, what = float(machine.memory), "on the smallest GPU here"
    else:
        have, what = (
            machine.memory / world_size,
            f"per process here: {machine.memory / 1e9:.3g} GB shared by {world_size}",
        )
    share = need / have
    found.add("fits", f"{need / 1e9:.3g} GB of {have / 1e9:.3g} GB {what}: {share:.0%}")
    if share > 1:
        found.missing.append(
            f"{need / 1e9:.3g} GB per process are needed, {have / 1e9:.3g} GB are there. See `iwsft layouts` for layouts that fit, or set "
            "parallel.recompute: full."
        )


def attained_tflops(run_directory: Path) -> float:
    """The median `tflops_per_gpu` of an earlier run. Raises DataError if its metrics have none."""
    path = run_directory / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{run_directory} is not a run directory: it has no {path.name}. Give the run.dir of a config.")
    rows, _ = read_json_lines(path)
    values = [row["tflops_per_gpu"] for row in rows if isinstance(row.get("tflops_per_gpu"), float)]
    if not values:
        raise DataError(f"{path} has no tflops_per_gpu. Give another run, or state it with --tflops.")
    return statistics.median(values)


def _duration(hours: float) -> str:
    return f"{hours * 3600:.3g} s" if hours < 1 / 60 else f"{hours * 60:.3g} min" if hours < 1 else f"{hours:.3g} h"
