"""Shared by the tests: generated inputs, an independent reference model, runs in job processes and from the command line."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the checkout
# The id of a user and group that have no name on this machine.
STRANGER = next(
    i for i in range(54321, 1 << 31) if i not in {u.pw_uid for u in pwd.getpwall()} | {g.gr_gid for g in grp.getgrall()}
)


def command_environment(**more: str) -> dict[str, str]:
    """The environment of a command that must import the package from this checkout, whatever is installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | more


def run_python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in the root of the checkout, and capture its output."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=command_environment(**environment),
        text=True,
        capture_output=True,
    )


def torchrun(processes: int) -> list[str]:
    """The arguments of Python that start a job of `processes` processes; a script or `-m module` follows."""
    return ["-m", "megatron_iwsft.distributed.torchrun", "--nproc_per_node", str(processes)]


def events(run: Path, kind: str) -> list[dict]:
    """The events of one kind in a run's logs/events.jsonl."""
    lines = [json.loads(line) for line in (run / "logs" / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
