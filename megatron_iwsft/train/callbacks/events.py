"""The event log of a run: printed for people, and in logs/events.jsonl for programs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.jsonl import JsonLines
from megatron_iwsft.utils.text import tell

_JOB = {"slurm_job": "SLURM_JOB_ID", "restarts": "SLURM_RESTART_COUNT"}


class Events:
    """Call it with an event's name and a sentence. With None as path it does nothing: on every rank but the main one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = None if path is None else JsonLines(path, tell)

    def __call__(self, event: str, text: str, **details: Any) -> None:
        if self.path is None or self._file is None:
            return
        tell(text)
        job = {key: os.environ[name] for key, name in _JOB.items() if name in os.environ}
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "text": text, **details, **job}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file.append(line)
        except OSError as error:  # a full disk must not end the run
            tell(f"{self.path}: {error.strerror}", error=True)
