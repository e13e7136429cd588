"""A program on a disk that it can fill: a tmpfs in a mount namespace, which only its own processes see."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, command_environment


def on_small_disk(module: str, *arguments: Path, size: str) -> Any:
    """Run a module of tests.support, with the disk mounted at its last argument; returns the JSON of the last line that it prints.

    Skips the test on a machine where users may make no mount namespace: there is no other disk that a test may fill.
    """
    mount = arguments[-1]
    mount.mkdir()
    script = 'size=$1 mount=$2; shift 2; mount -t tmpfs -o "size=$size" tmpfs "$mount" && exec "$@"'
    program = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", size, str(mount), *program],
        cwd=ROOT,
        env=command_environment(),
        text=True,
        capture_output=True,
        timeout=600,
    )
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip(f"this machine allows no mount namespace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fill_disk(path: Path, *, leaving: int) -> None:
    """Write to `path` until the disk is full, whatever else is being written; then free `leaving` bytes."""
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(max(0, file.tell() - leaving))
