"""torchrun that ends with its workers' own exit status, leaves the last word to their message, and lets them finish when told to stop.

`python -m megatron_iwsft.distributed.torchrun [torchrun options] SCRIPT ARGS…`. Plain torchrun works too; it ends with status 1 whatever
the workers said, adds a traceback of its own to a user's mistake, kills workers that are still saving 30 s after a SIGTERM, and,
before torch 2.13, lets two runs on one machine want the same port.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time

import psutil

from megatron_iwsft.errors import EXIT_REQUEUE

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# srun ends the other nodes with the first that leaves; so long they have to leave with the same status.
_LEAVING_S = 2.0


def main() -> int:
    # Workers share the machine's cores; one thread each unless the user says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torchrun's own answer to SIGTERM is to kill the workers.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    if "SLURM_NODEID" in os.environ:
        os.environ.setdefault("PET_NODE_RANK", os.environ["SLURM_NODEID"])
    told = _pass_on_stop_signals()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    arguments = sys.argv[1:]
    parsed = parse_args(arguments)
    if parsed.nnodes in ("1", "1:1") and parsed.master_port == 29500:  # before torch 2.13 the default
        arguments = ["--master_port", str(_free_port()), *arguments]
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_REQUEUE:
            time.sleep(_LEAVING_S)
        if failure.exitcode >= 0:
            return failure.exitcode
        if told:  # before it listened to signals: nothing was done yet
            return EXIT_REQUEUE
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid} on {socket.gethostname()}) was ended by {name}.", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("", 0))
        return unused.getsockname()[1]


def _pass_on_stop_signals() -> list[int]:
    """Hand stop signals to the workers; returns the list that those that came are added to."""
    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it may end at this moment
                worker.send_signal(number)

    for number in _STOP_SIGNALS:
        signal.signal(number, pass_on)
    return told


if __name__ == "__main__":
    sys.exit(main())
