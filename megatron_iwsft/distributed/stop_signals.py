"""Handle SIGUSR1, SIGTERM and Ctrl-C: finish the step, save a checkpoint and exit; on a second signal, exit at once.

Python runs signal handlers in the main thread, which may be blocked in a collective for minutes. A separate thread therefore reads
the signal numbers from the interpreter's wakeup pipe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

from megatron_iwsft.errors import EXIT_FAILURE, EXIT_REQUEUE
from megatron_iwsft.utils.text import tell

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Slurm signals every process of a job step, a terminal every process of a job, and srun and torchrun forward theirs: one request arrives
# several times.
_ONE_REQUEST_S = 3.0


def heeded_signals() -> list[signal.Signals]:
    """The stop signals that this process does not ignore: a shell has commands in the background ignore SIGINT."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_on_stop_signals() -> None:
    """Exit with status 75 on a stop signal, until `StopSignals` is entered: for a start-up, in which nothing can be lost yet."""
    for number in heeded_signals():
        signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopSignals:
    """Context manager: the first stop signal sets `requested`, a second one exits the process with status 75.

    Enter it in the main thread. Forked children share it: a signal to one of them counts as well.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> StopSignals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in heeded_signals()}
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
        prints = os.environ.get("RANK", "0") == "0"
        if not self.requested:
            self.requested, self._first = True, now
            if prints:
                tell(f"{name}: stopping after this step, which is saved. Signal again to stop now.")
        elif now - self._first > _ONE_REQUEST_S:
            if prints:
                tell(f"{name} again: stopping now; what was saved before is kept.", error=True)
            os._exit(EXIT_REQUEUE)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent exits, so that a killed job leaves no processes behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def forks_die_with_their_parent() -> None:
    """Call `die_with_parent` in every process forked from this one, also if the parent exits before the call."""
    parent = [0]

    def note() -> None:
        parent[0] = os.getpid()

    def follow() -> None:
        die_with_parent()
        if os.getppid() != parent[0]:
            os._exit(EXIT_FAILURE)

    os.register_at_fork(before=note, after_in_child=follow)
