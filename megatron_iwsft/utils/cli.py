"""Exit statuses and error messages of commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_iwsft.errors import (
    EXIT_FAILURE,
    EXIT_REQUEUE,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    PeerError,
    RequeueError,
    UserError,
)
from megatron_iwsft.utils.terminal import printable


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its status. A `UserError` is printed as one message on standard error.

    Statuses: 0 success, 2 a user's mistake, 75 stopped on request and to be restarted, 130 interrupted, 141 standard output was closed
    (as by `| head`), 1 anything else.

    In a job with several ranks only one prints, since most mistakes reach every rank: rank 0 first, then, after a delay, the first
    rank of each machine, then the others. torchrun ends the other ranks of a machine as soon as one has failed.
    """
    status: Any
    try:
        try:
            status = main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        sys.stdout.flush()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(3 if os.environ.get("LOCAL_RANK") == "0" else 6)
        where = f" (rank {rank})" if rank > 0 else ""
        _leave(EXIT_USER_ERROR, f"{type(error).__name__}{where}: {error}")
    except RequeueError:
        _leave(EXIT_REQUEUE, None)
    except PeerError:
        _leave(EXIT_FAILURE, None)
    except BrokenPipeError:
        if not _output_is_closed():
            _leave(EXIT_FAILURE, traceback.format_exc())
        _leave(EXIT_UNREAD, "standard output was closed; stopping." if "RANK" in os.environ else None)
    except OSError as error:
        _leave(EXIT_USER_ERROR, f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        _leave(EXIT_FAILURE, traceback.format_exc())
    sys.exit(status or 0)


def positive_int(text: str) -> int:
    """An argparse type for counts. Raises ArgumentTypeError for anything but an integer above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer above 0; found {text!r}")
    return value


def _output_is_closed() -> bool:
    """Whether the reader of standard output has gone; if not, a broken pipe was some other pipe."""
    output = select.poll()
    output.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _leave(status: int, message: str | None) -> NoReturn:
    """End the process at once: interpreter teardown would add tracebacks from peers that wait in a collective."""
    if message is not None:
        print(printable(message), file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)
