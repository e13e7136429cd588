"""torchrun that returns its workers' exit status, prints no traceback of its own, and waits for workers that stop on a signal.

`python -m megatron_iwsft.distributed.torchrun [torchrun options] SCRIPT ARGS…`. Plain torchrun works too, but it always exits with
status 1, prints its own traceback after a worker's error message, kills workers that are still saving 30 s after a SIGTERM, and has
jobs on one machine listen on every network interface.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from megatron_iwsft.distributed.stop_signals import STOP_SIGNALS, heeded_signals
from megatron_iwsft.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_iwsft.utils.cli import imports, prepare_streams
from megatron_iwsft.utils.text import tell

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# srun ends all nodes when the first one exits; this gives the others time to exit with the same status.
_LEAVING_S = 2.0
_LOOK_S = 0.2
_STARTING_S = 10.0  # between the nodes' meeting and the first worker
_RESOLVING_S = 30.0  # a node's name service may be late
_STOPPED = (EXIT_REQUEUE, *(-number for number in STOP_SIGNALS))


class StopNotice:
    """Stop signals to this process. They are forwarded to every worker once, also to workers that start soon.

    While it waits for the other nodes there are none: then it ends, since nothing has begun.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.workers_may_run = False
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in heeded_signals():
            signal.signal(number, lambda *_: None)
        # Python's handlers run in the main thread, which torch may keep for minutes while it waits for the first node.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # launch/local.sh blocks them until here

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in STOP_SIGNALS:
                if number in numbers:
                    if not self.workers_may_run:  # nothing has begun, so nothing is lost
                        os._exit(EXIT_REQUEUE)
                    self.signal = number
                    threading.Thread(target=self._forward, args=(number,), daemon=True).start()

    def _forward(self, number: int) -> None:
        import psutil

        told: set[int] = set()
        until = time.monotonic() + _STARTING_S
        while told or time.monotonic() < until:
            for worker in psutil.Process().children():
                if worker.pid not in told:
                    told.add(worker.pid)
                    with contextlib.suppress(psutil.Error):  # it has just exited
                        worker.send_signal(number)
            time.sleep(_LOOK_S)
        os._exit(EXIT_REQUEUE)


def main() -> int:
    notice = StopNotice()  # before anything that takes time
    prepare_streams()
    # Workers share the machine's cores: one thread each unless the user sets another number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torchrun's own handlers of the stop signals would kill the workers.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    if "SLURM_NODEID" in os.environ:
        os.environ.setdefault("PET_NODE_RANK", os.environ["SLURM_NODEID"])
    with imports():
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main as torchrun
        from torch.distributed.run import parse_args

        from megatron_iwsft.distributed.descriptors import raise_descriptor_limit
        from megatron_iwsft.distributed.loopback import keep_to_loopback, register_with_torchrun

    raise_descriptor_limit()  # on the first node, this process hosts the store
    arguments = sys.argv[1:]
    parsed = parse_args(arguments)
    if parsed.nnodes in ("1", "1:1"):
        keep_to_loopback()
        if parsed.rdzv_backend == "static" and not parsed.standalone:
            arguments = [f"--rdzv_backend={register_with_torchrun()}", *arguments]
    elif (why := unresolved(parsed.rdzv_endpoint.rpartition(":")[0] or parsed.master_addr)) is not None:
        tell(why, error=True)
        return EXIT_USER_ERROR
    for name in ("elastic.multiprocessing.api", "elastic.agent.server.api", "run"):
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    notice.workers_may_run = True
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        return _status(error, notice)
    except SignalException as interruption:  # torchrun has ended the workers
        return 128 + interruption.sigval
    except DistError as error:  # its port is taken, or the first node cannot be reached
        where, why = f"{parsed.master_addr}:{parsed.master_port}", str(error).strip().splitlines()[0]
        tell(f"the nodes cannot meet at {where} (--master-addr, --master-port): {why}", error=True)
        return EXIT_USER_ERROR
    return 0


def unresolved(host: str, *, patience_s: float = _RESOLVING_S) -> str | None:
    """A sentence if the first node's name cannot be resolved; None if it can. torch would try for many minutes."""
    until = time.monotonic() + patience_s
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), None)
            return None
        except OSError as error:
            if time.monotonic() >= until:
                return (
                    f"the nodes cannot meet at {host} (--master-addr): the name cannot be resolved ({error.strerror}). Correct it, or this "
                    f"machine's name resolution: `getent hosts {host}` must print an address."
                )
        time.sleep(1)


def _status(error: ChildFailedError, notice: StopNotice) -> int:
    """The exit status of a job with a worker that failed."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == EXIT_REQUEUE:
        time.sleep(_LEAVING_S)
    # A worker that a stop signal ended had not installed its handler yet, so nothing is lost.
    if notice.signal and any(f.exitcode in _STOPPED for f in error.failures.values()):
        return EXIT_REQUEUE
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    tell(f"rank {rank} (process {failure.pid} on {socket.gethostname()}) was ended by {name}.", error=True)
    return 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
