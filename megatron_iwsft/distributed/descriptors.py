"""File descriptors: the process that hosts a job's store needs one for every connection to it."""

from __future__ import annotations

import resource

# A rank connects twice (process group and watchdog), its torchrun once.
CONNECTIONS_PER_RANK = 3
_OTHERS = 256  # files, libraries and pipes of the process itself


def raise_descriptor_limit() -> int:
    """Raise this process's limit on open files, and that of processes it starts, to the hard limit; returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def largest_world(limit: int) -> int:
    """How many ranks a store can serve under a limit on open files. Above that, ranks fail to connect."""
    return max(0, limit - _OTHERS) // CONNECTIONS_PER_RANK
