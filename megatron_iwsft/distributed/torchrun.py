"""torchrun that returns its workers' exit status, prints no traceback of its own, and waits for workers that stop on a signal.

`python -m megatron_iwsft.distributed.torchrun [torchrun options] SCRIPT ARGS…`. Plain torchrun works too, but it always exits with
status 1, prints its own traceback after a worker's error message, kills workers that are still saving 30 s after a SIGTERM, and,
before torch 2.13, uses the same port for every run on a machine.
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
# srun ends all nodes when the first one exits; this gives the others time to exit with the same status.
_LEAVING_S = 2.0


def main() -> int:
    # Workers share the machine's cores: one thread each unless the user sets another number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torchrun's own SIGTERM handler would kill the workers.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    if "SLURM_NODEID" in os.environ:
        os.environ.setdefault("PET_NODE_RANK", os.environ["SLURM_NODEID"])
    signals = _forward_stop_signals()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    arguments = sys.argv[1:]
    parsed = parse_args(arguments)
    if parsed.nnodes in ("1", "1:1") and parsed.master_port == 29500:  # the default before torch 2.13
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
        if signals:  # the worker had not installed its handler yet, so nothing is lost
            return EXIT_REQUEUE
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} (process {failure.pid} on {socket.gethostname()}) was ended by {name}.", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("", 0))
        return unused.getsockname()[1]


def _forward_stop_signals() -> list[int]:
    """Forward stop signals to the workers. Returns a list to which every received signal is appended."""
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it may have just exited
                worker.send_signal(number)

    for number in _STOP_SIGNALS:
        signal.signal(number, forward)
    return received


if __name__ == "__main__":
    sys.exit(main())
