"""Limits on time and memory for code that somebody else wrote, such as a chat template."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TimeLimit(Exception):
    """A block took longer than its limit."""


@contextmanager
def limits(*, seconds: float, extra_bytes: int) -> Iterator[None]:
    """Raise TimeLimit in the block after `seconds` of CPU time, MemoryError if the process grows by more than `extra_bytes`.

    On a busy machine, CPU time is the same, and so is what is dropped for it.
    A blocking call in C is interrupted only when it returns. Only the main thread can be limited in time; others are not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _address_space() + extra_bytes
    bounded = soft == resource.RLIM_INFINITY or wanted < soft
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGVTALRM, _raise) if main else None
    try:
        if bounded:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        if main:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, previous)
        if bounded:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _raise(number: int, frame: FrameType | None) -> None:
    raise TimeLimit


def _address_space() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
