"""A job in which one rank raises while the others wait for it in a collective. test_faults runs this module under torchrun."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_iwsft.distributed.context import start
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.utils.cli import run_command


def main() -> None:
    platform = start("cpu", timeout_s=60)
    with Watchdog(platform.rank, platform.world_size, timeout_s=60, logs=Path("/nonexistent")):
        if platform.rank == 2:
            raise ValueError("rank 2 has had enough")
        dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    run_command(main)
