"""Run by test_faults in a mount namespace: a run on a small disk that someone fills and later empties."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from megatron_iwsft.testing import comparable_metrics as metrics
from tests.support.interrupt import Run, events


def fill(path: Path, *, leaving: int) -> None:
    """Write until the disk is full, whatever else is being written meanwhile; then give `leaving` bytes back."""
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(max(0, file.tell() - leaving))


def main(config: str, mount: Path) -> None:
    directory = mount / "run"
    run = Run(
        Path(config),
        directory,
        "checkpoint.retry_after=3",
        "checkpoint.max_failures=100",
        "logging.wandb.mode=disabled",
    )
    run.until((directory / "checkpoints" / "latest").exists)
    fill(mount / "filler", leaving=100_000)
    run.until(lambda: len(events(directory, "save failed")) >= 1)
    whole = sorted(p.parent.name for p in directory.glob("checkpoints/step-*/iwsft.json"))
    (mount / "filler").unlink()
    status = run.finish()
    failures = [line for line in run.output.splitlines() if line.startswith("saving after step")]
    print(
        json.dumps({"status": status, "metrics": metrics(directory), "failures": failures, "whole_while_full": whole})
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
