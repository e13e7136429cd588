"""Damage to files, for tests of those who read them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_array(path: Path, dtype: type, change: Callable[[np.ndarray], None]) -> None:
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)


def fifo(name: str) -> Callable[[Path], None]:
    """Of a directory: puts a FIFO, which blocks its reader, in the place of a file."""

    def attack(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return attack
