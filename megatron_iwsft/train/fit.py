"""`iwsft doctor --config`: does a run fit this machine? The plan of `--dry-run`, with memory compared and time estimated."""

from __future__ import annotations

import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megatron_iwsft.checkpoint.info import complete_checkpoints
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.config.schema import Config
from megatron_iwsft.distributed.context import DeviceChoice, chosen_device
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.model.flops import peak_tflops
from megatron_iwsft.train.plan import Plan, plan
from megatron_iwsft.utils.jsonl import read_json_lines
from megatron_iwsft.utils.memory import group_limit


@dataclass(frozen=True)
class Machine:
    """gpus: that a run would use here. memory: bytes of the smallest GPU; without one, of the host, which its processes share.

    peak   TFLOP/s of the slowest GPU in bf16; None if that is not known
    lacks  the GPU that the run asks for, in one sentence; None if it asks for none or has it
    """

    gpus: int
    memory: int
    peak: float | None = None
    lacks: str | None = None

    @staticmethod
    def here(device: DeviceChoice) -> Machine:
        """device: `run.device` of the config. IWSFT_DEVICE counts as when the run starts. Raises ConfigError for another value of it."""
        choice = chosen_device(device)
        gpus = 0 if choice == "cpu" else torch.cuda.device_count()
        if not gpus:
            lacks = "the run asks for CUDA, and torch sees no GPU here. Set run.device to auto or cpu, or use a machine with GPUs."
            limit = group_limit()
            total = psutil.virtual_memory().total
            return Machine(0, min(total, limit or total), lacks=lacks if choice == "cuda" else None)
        peaks = [peak_tflops(torch.cuda.get_device_name(i)) for i in range(gpus)]
        known = [peak for peak in peaks if peak is not None]
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        return Machine(gpus, memory, min(known) if len(known) == gpus else None)

    def tflops_at(self, mfu: float) -> float:
        """At a share of the peak. Raises ConfigError if the peak is not known."""
        if self.peak is None:
            raise ConfigError("--mfu needs a GPU here whose peak is known. State the rate with --tflops.")
        return mfu * self.peak


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
    tflops  model TFLOP/s that each process attains; by default what the run has attained so far, if it has begun
    """
    found = plan("train", config, world_size=world_size, model_config=model_config, allow_missing=True)
    if machine.lacks is not None:
        found.missing.append(machine.lacks)
    elif machine.gpus:
        _compare_gpus(found, machine.gpus, world_size)
    if found.memory is not None and (memory is not None or machine.lacks is None):
        _compare_memory(found, machine, world_size, memory)
    if found.flops is not None:
        if tflops is None and complete_checkpoints(Path(config.run.dir) / CHECKPOINTS):
            with suppress(DataError):
                tflops = attained_tflops(Path(config.run.dir))
        each = "GPU" if machine.gpus or machine.lacks is not None else "process"
        found.add("time", _time(found.flops, found.trained, tflops, world_size, each))
    return found


def _time(flops: float, trained: float, tflops: float | None, world_size: int, each: str) -> str:
    """flops: per process, of the complete run, of which the share `trained` is done."""
    if tflops is None:
        return f"not estimated: state the TFLOP/s per {each} (--tflops, --mfu), or a similar run (--like RUN_DIR)"
    hours = flops / (tflops * 1e12) / 3600
    text = f"{_duration(hours)} at {tflops:.3g} TFLOP/s per {each}, {hours * world_size:,.3g} {each} hours in all"
    left = (1 - trained) * hours
    return f"{text}; {_duration(left)} and {left * world_size:,.3g} {each} hours of it are left" if trained else text


def _compare_gpus(found: Plan, gpus: int, world_size: int) -> None:
    """A run of several nodes is compared with one of them."""
    if world_size <= gpus:
        found.add("GPUs", f"{world_size} of this machine's {gpus}")
    elif world_size % gpus == 0:
        found.add("GPUs", f"{world_size}: {world_size // gpus} machines with {gpus} each, as here")
    else:
        found.missing.append(
            f"{world_size} processes need as many GPUs; this machine has {gpus}, which does not divide {world_size}. "
            "Change parallel or --gpus."
        )


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
