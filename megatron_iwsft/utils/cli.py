"""How commands end: exit statuses, one message per mistake, quiet when nobody reads the output."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from megatron_iwsft.errors import (
    EXIT_FAILURE,
    EXIT_REQUEUE,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    PeerError,
    RequeueError,
    UserError,
)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its status; a `UserError` becomes one message on standard error.

    Statuses: 0 done, 2 a user's mistake, 75 stopped on request and to be started again, 130 interrupted, 141 nobody reads the output
    any more (as after `| head`), 1 anything else. Of the ranks of a job only one speaks: most mistakes are met by every rank, so rank
    0 is given time to speak first, then the first rank of each machine; torchrun ends the others of its machine with the first that
    fails.
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
        if _output_is_read():
            _leave(EXIT_FAILURE, traceback.format_exc())
        _leave(EXIT_UNREAD, "nobody reads the output any more; the run ends." if "RANK" in os.environ else None)
    except OSError as error:
        _leave(EXIT_USER_ERROR, f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        _leave(EXIT_FAILURE, traceback.format_exc())
    sys.exit(status or 0)


def positive_int(text: str) -> int:
    """The type of command-line options that count something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; found {text!r}")
    return value


def _output_is_read() -> bool:
    """Whether standard output has a reader, or needs none; otherwise a broken pipe was another one."""
    output = select.poll()
    output.register(1, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _leave(status: int, message: str | None) -> None:
    """End the process without the interpreter's teardown, where peers waiting in a collective would add tracebacks of their own."""
    if message is not None:
        print(message, file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(status)
