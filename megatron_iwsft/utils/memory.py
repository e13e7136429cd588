"""Memory of this process: errors that mean that it ran out, as a sentence; and keeping what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import socket
from pathlib import Path

_NO_LIMIT = 2**60  # version 1 of control groups has a huge number in place of no limit
# What torch, its allocators, glibc and Python's threads say.
_SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
)
# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of large arrays, in this process and those that it forks. It would map each of them anew, and the
    kernel clear every page of it: a fifth of the CPU time of a step of SmolLM2, and a tenth of sharding.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def out_of_memory(error: BaseException) -> str | None:
    """A sentence for people if `error`, or what it came from, is a refused allocation; None if it is not."""
    cause: BaseException | None = error
    while cause is not None and not _is_refused_allocation(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    what = (str(cause).strip().splitlines() or ["an allocation was refused"])[0]
    who = f"process {os.getpid()} on {socket.gethostname()}"
    who = f"rank {os.environ['RANK']} ({who})" if "RANK" in os.environ else who
    return (
        f"{who} is out of memory: {what:.300}.{_limits()} Give it more memory, or make what it holds smaller: "
        "`iwsft doctor --config` says what a run needs. A run that is started again continues from its last checkpoint."
    )


def _is_refused_allocation(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def _limits() -> str:
    """The limits that this process has, besides the machine's memory."""
    found = []
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append(f"{address_space / 2**30:.2f} GiB of address space (ulimit -v)")
    group = group_limit()
    if group is not None:
        found.append(f"{group / 2**30:.2f} GiB in its control group")
    return f" Its limit is {' and '.join(found)}." if found else ""


def group_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes of memory that this process's control groups, as of a container or a Slurm job, leave to it; None without a limit.

    root: where control groups are mounted. own: the kernel's list of the groups of this process, `number:controllers:/path` a line.
    """
    limits = []
    for line in _text(own).splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        inside = Path(path.lstrip("/"))  # every group above limits it, too
        limits += [_text(base / group / name).strip() for group in (inside, *inside.parents)]
    numbers = [int(limit) for limit in limits if limit.isdigit()]
    return min((number for number in numbers if number < _NO_LIMIT), default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
