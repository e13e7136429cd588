"""SIGUSR1 and SIGTERM: finish the step, save, exit; a second one: stop now.

Python runs its handlers between two instructions of the main thread, which may sit in a collective for minutes. So a thread of
its own reads the signals' numbers from the pipe that the interpreter writes them to as they come.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

from megatron_iwsft.errors import EXIT_FAILURE, EXIT_REQUEUE

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# Slurm signals every process of a job step, and its launcher and torchrun pass theirs on: one request comes in several copies.
_ONE_REQUEST_S = 3.0


class StopSignals:
    """A context in which `requested` becomes true with the first stop signal, and a second ends the process with status 75.

    To be entered in the main thread. Forked children share it: a signal to one of them counts too.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")  # ends the thread
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            if 0 in numbers:
                return
            if any(number in STOP_SIGNALS for number in numbers):
                self._on_signal(signal.Signals(next(n for n in numbers if n in STOP_SIGNALS)).name)

    def _on_signal(self, name: str) -> None:
        now = time.monotonic()
        speaks = os.environ.get("RANK", "0") == "0"
        if not self.requested:
            self.requested, self._first = True, now
            if speaks:
                print(f"{name}: stopping after this step, with a checkpoint; again: stopping now.", flush=True)
        elif now - self._first > _ONE_REQUEST_S:
            if speaks:
                print(f"{name} again: stopping now; the last complete checkpoint stands.", file=sys.stderr, flush=True)
            os._exit(EXIT_REQUEUE)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, so that a killed job leaves none behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forks_die_with_their_parent() -> None:
    """`die_with_parent` in whatever this process forks, and its forks; a parent may be gone before the kernel is told."""
    parent = [0]

    def note() -> None:
        parent[0] = os.getpid()

    def follow() -> None:
        die_with_parent()
        if os.getppid() != parent[0]:
            os._exit(EXIT_FAILURE)

    os.register_at_fork(before=note, after_in_child=follow)


def die_with_spawner() -> None:
    """`die_with_parent` for a process of multiprocessing's, whose start takes long enough for the other to be gone before."""
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(EXIT_FAILURE)
