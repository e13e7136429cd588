"""A run on a small disk that is filled and later emptied. test_faults runs this module in a mount namespace.

Prints one JSON object: the exit status, metrics, messages of failed saves, and what was in the directory of checkpoints after them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_iwsft.testing import comparable_metrics
from tests.support import events
from tests.support.launched_runs import LaunchedRun
from tests.support.small_disk import fill_disk


def main(config: Path, mount: Path) -> None:
    directory = mount / "run"
    overrides = ("checkpoint.retry_after=3", "checkpoint.max_failures=100", "logging.wandb.mode=disabled")
    run = LaunchedRun(config, directory, *overrides)
    run.wait_until((directory / "checkpoints" / "latest").exists)
    fill_disk(mount / "filler", leaving=100_000)
    run.wait_until(lambda: len(events(directory, "save failed")) >= 1)
    complete = sorted(p.parent.name for p in directory.glob("checkpoints/step-*/iwsft.json"))
    unfinished = sorted(p.name for p in directory.glob("checkpoints/*.partial"))
    (mount / "filler").unlink()
    found = {
        "status": run.finish(),
        "metrics": comparable_metrics(directory),
        "failures": [line for line in run.output.splitlines() if line.startswith("saving after step")],
        "complete_while_full": complete,
        "unfinished_while_full": unfinished,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
