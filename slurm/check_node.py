"""Check that this node is fit to run: GPUs, free memory, disk, clock. Runs on every node before a job and names an unfit one.

Uses only the standard library, so that it runs even where nothing else is installed correctly.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

CLOCK_TOLERANCE_S = 30  # covers srun's start-up time and the drift of synchronised clocks
GPU_MEMORY_IN_USE = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs that must respond and be free")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="GiB of memory that must be available")
    parser.add_argument(
        "--disk-gib",
        type=float,
        default=0.0,
        help="GiB that DIRECTORY must have free (and the temporary directory, up to 1)",
    )
    parser.add_argument("--time", type=float, help="clock of the first node, in seconds since the epoch")
    parser.add_argument("directory", nargs="?", help="where the job will write")
    args = parser.parse_args()
    problems = [*memory(args.memory_gib), *gpus(args.gpus)]
    for directory in filter(None, (args.directory, tempfile.gettempdir())):
        problems += disk(directory, args.disk_gib if directory == args.directory else min(args.disk_gib, 1.0))
    if args.time is not None and abs(time.time() - args.time) > CLOCK_TOLERANCE_S:
        problems.append(f"its clock differs from the first node's by {time.time() - args.time:+.0f} s")
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    for problem in problems:
        print(f"unfit node {node}: {problem}", flush=True)
    return int(bool(problems))


def memory(needed_gib: float) -> list[str]:
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 2**20
    return [f"{available:.1f} GiB of memory available, {needed_gib:g} required"] if available < needed_gib else []


def disk(directory: str, needed_gib: float) -> list[str]:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(directory).free / 2**30
    except OSError as error:
        return [f"{directory} cannot be written to: {error.strerror}"]
    return [f"{directory} has {free:.1f} GiB free, {needed_gib:g} required"] if free < needed_gib else []


def gpus(needed: int) -> list[str]:
    if needed == 0:
        return []
    command = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except FileNotFoundError:
        return [f"{needed} GPUs expected, but nvidia-smi is not installed"]
    except subprocess.TimeoutExpired:
        return ["nvidia-smi does not respond"]
    except subprocess.CalledProcessError as error:
        return [f"nvidia-smi failed: {(error.stdout or error.stderr).strip()}"]
    out = [] if len(lines) >= needed else [f"{len(lines)} GPUs respond, {needed} expected"]
    for line in lines:
        index, used, total = (part.strip() for part in line.split(","))
        if used.isdigit() and total.isdigit() and int(used) > GPU_MEMORY_IN_USE * int(total):
            out.append(f"GPU {index} has {used} of {total} MiB in use by other processes")
    return out


if __name__ == "__main__":
    sys.exit(main())
