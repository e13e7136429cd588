"""A real two-node Slurm on this machine, and helpers for the tests that use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Lab:
    """A running Slurm. Jobs are submitted from `directory`, which is also where their logs are written."""

    def __init__(self, home: Path, directory: Path) -> None:
        self.home, self.directory = home, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {
            "PATH": f"{home}/run/bin:{os.environ['PATH']}",
            "SLURM_CONF": f"{home}/run/etc/slurm.conf",
            "IWSFT_DEVICE": "cpu",
            "IWSFT_VENV": str(Path(sys.executable).parents[1]),
            "IWSFT_MIN_MEMORY_GIB": "0.5",
            "IWSFT_MIN_DISK_GIB": "0.5",
        }

    def call(self, *command: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=self.directory, env=self.env, text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str | Path) -> str:
        return self.call("sbatch", "--parsable", *arguments).strip()

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, timeout_s: float = 420) -> str:
        """Wait until a job has ended and is not requeued; returns its state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
        self.until(lambda: self.state(job) in ended and not self._pending(job), job, timeout_s)
        return self.state(job)

    def _pending(self, job: str) -> bool:
        return self.call("squeue", "-h", "-j", job, check=False).strip() != ""

    def until(self, condition: Callable[[], bool], job: str, timeout_s: float = 300) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{self.show(job)}\n{self.processes(job)}\n{self.log(job)}"
            time.sleep(0.3)

    def processes(self, job: str) -> str:
        """The processes of a job on all nodes, and what each waits for in the kernel."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("SLURM_JOB_ID") == job:
                    waits = Path(f"/proc/{process.pid}/wchan").read_text()
                    found.append(f"{process.pid} {process.status()} {waits} {' '.join(process.cmdline())[:150]}")
        return "\n".join(found)

    def log(self, job: str) -> str:
        """What the job has printed; and the Python stacks of runs that hung, if any test's did."""
        files = [*self.directory.glob(f"*-{job}.log"), *self.directory.parent.rglob("hang-rank-*.txt")]
        return "".join(p.read_text(errors="replace") for p in sorted(files))

    def rank(self, job: str, rank: int) -> psutil.Process:
        """The process of a rank of a training job."""
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if (
                    env.get("SLURM_JOB_ID") == job
                    and env.get("RANK") == str(rank)
                    and "megatron_iwsft train" in " ".join(process.cmdline())
                ):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"job {job} has no rank {rank}")


@contextmanager
def running_lab(directory: Path) -> Iterator[Lab]:
    """Start Slurm, and stop it afterwards. Raises RuntimeError, naming what is missing, if it cannot start."""
    home = Path(
        tempfile.mkdtemp(prefix="slurmlab-")
    )  # not pytest's tmp_path: munge needs a world-readable socket directory
    env = os.environ | {
        "SLURMLAB_DIR": str(home),
        "SLURMLAB_GPUS": "0",
        "SLURMLAB_CPUS": "8",
        "SLURMLAB_KILLWAIT": "15",
    }
    started = subprocess.run(["bash", HERE / "start.sh"], env=env, text=True, capture_output=True)
    if started.returncode:
        raise RuntimeError(
            "The tests of slurm/ could not start their own Slurm here. It requires root, Debian 12 or later with a reachable package "
            "index, and network, host name and mount namespaces (not with SLURMLAB_MODE=multi):\n"
            f"{started.stdout}{started.stderr}"
        )
    try:
        yield Lab(home, directory)
    finally:
        subprocess.run(["bash", HERE / "stop.sh"], env=env, text=True, capture_output=True, timeout=180)
        shutil.rmtree(home, ignore_errors=True)
