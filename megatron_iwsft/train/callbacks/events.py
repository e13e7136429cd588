"""The event log of a run: printed for people, and in logs/events.jsonl for programs."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

_JOB = {"slurm_job": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT"}


class Events:
    """Call it with an event's name and a sentence. With None as path it does nothing: on every rank but the main one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, event: str, text: str, **details: Any) -> None:
        if self.path is None:
            return
        print(text, flush=True)
        job = {key: os.environ[name] for key, name in _JOB.items() if name in os.environ}
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "text": text, **details, **job}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line)) + "\n")
        except OSError as error:  # a full disk must not end the run
            print(f"{self.path}: {error.strerror}", file=sys.stderr, flush=True)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Values for JSON, which has no nan and no infinity: null in their place."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
