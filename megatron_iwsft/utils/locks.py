"""A lock that two processes which write into one directory, or one file, cannot both hold."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_iwsft.errors import UserError
from megatron_iwsft.utils.files import open_for_writing, read_regular

LOCK = ".lock"


@contextmanager
def exclusive(
    directory: Path, error: type[UserError], *, name: str | None = None, patience_s: float = 0.0
) -> Iterator[None]:
    """Hold the lock of an existing directory; with `name`, that of a file in it, whether there is one yet or not.

    Raises `error` if another process still holds it after `patience_s`, or OSError.

    The lock is advisory and ends with the process; on a file system without locks there is none. A directory's is on the directory,
    since a file in it can be removed while it is held, and on a file, since network file systems lock only files; the file says who
    holds it.
    """
    what, until = directory / (name or ""), time.monotonic() + patience_s
    path = directory / (f".{name}{LOCK}" if name else LOCK)
    with ExitStack() as held:
        if not name:
            handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, handle)
            if not _locked(handle, until):
                raise error(_in_use(what, path))
        while True:
            file = held.enter_context(open_for_writing(path, os.O_RDWR | os.O_APPEND))
            if not _locked(file.fileno(), until):
                raise error(_in_use(what, path))
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break  # else the holder removed it between the two calls
        held.callback(path.unlink, missing_ok=True)
        job = os.environ.get("SLURM_JOB_ID", "none")
        with suppress(OSError):  # on a full disk there is a lock, but not who holds it
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, Slurm job {job}".encode())
        yield


def _locked(handle: int, until: float) -> bool:
    """Lock a file or directory, or find it locked by another process until then. True where there are no locks."""
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(1)
        except OSError:
            return True


def _in_use(what: Path, lock: Path) -> str:
    try:
        holder = read_regular(lock)[:200].decode(errors="replace") or "unknown"
    except OSError:
        holder = "unknown"
    return f"{what} is in use by another job ({holder}). Wait for it, stop it, or choose another directory."
