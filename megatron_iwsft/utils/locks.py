"""A lock that two processes with the same output cannot both hold."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_iwsft.errors import UserError

LOCK = ".lock"


@contextmanager
def exclusive(directory: Path, error: type[UserError]) -> Iterator[None]:
    """Hold the lock of an existing directory. Raises `error` if another process holds it, OSError if none can be created.

    The lock is advisory and ends with the process; on a file system without locks there is none.
    """
    path = directory / LOCK
    file = _open_and_lock(path, error)
    try:
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _open_and_lock(path: Path, error: type[UserError]) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace") or "unknown"
            os.close(file)
            raise error(
                f"{path.parent} is being written by another command ({holder}). Wait until it is done, or choose another output."
            ) from None
        except OSError:
            return file
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # the holder removed it between the two calls
