"""Exit statuses and error messages of commands."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import gc
import io
import locale
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from megatron_iwsft.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    DataError,
    PeerError,
    RequeueError,
    UserError,
)
from megatron_iwsft.utils.memory import out_of_memory
from megatron_iwsft.utils.text import say

_HALF_MESSAGE = 10_000  # characters


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Within it, no garbage is looked for, and what is imported is never looked at again: a tenth of a training process's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit with its status. A `UserError` is printed as one message on standard error.

    Statuses: 0 success, 2 a user's mistake, 75 stopped on request and to be restarted, 130 interrupted, 141 standard output was closed
    (as by `| head`), 1 anything else.

    In a job with several ranks only one prints, since most mistakes reach every rank: rank 0 first, then, after a delay, the first
    rank of each machine, then the others. torchrun ends the other ranks of a machine as soon as one has failed.
    """
    prepare_streams()
    _handle_interrupts()
    try:
        _run(main)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _run(main: Callable[[], int | None]) -> NoReturn:
    status: Any
    try:
        try:
            status = main()
        except SystemExit as exit:  # argparse's
            status = exit.code
        sys.stdout.flush()
    except UserError as error:
        rank = _rank()
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
        if error.errno == errno.ENOMEM:
            _leave(EXIT_FAILURE, out_of_memory(error))
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _leave(EXIT_USER_ERROR, f"{what}. Check the path, its permissions and the disk's space.")
    except UnicodeError as error:
        if not _is_ascii(locale.getpreferredencoding(False)):
            _leave(EXIT_FAILURE, traceback.format_exc())
        _leave(
            EXIT_USER_ERROR,
            f"the locale's text encoding is ASCII, in which some names and files cannot be read or written ({error}). "
            "Set PYTHONUTF8=1, or LC_ALL to a UTF-8 locale such as C.UTF-8.",
        )
    except Exception as error:
        _leave(EXIT_FAILURE, out_of_memory(error) or traceback.format_exc())
    sys.exit(status or 0)


def prepare_streams() -> None:
    """Make standard input, output and error usable, whatever state this process got them in.

    A closed descriptor is opened on the null device: otherwise the next file to be opened would take its number, and get what is
    printed. Text that the output's encoding lacks is escaped, and bytes that are not text are read as U+FFFD; ASCII, of the locale C,
    is taken for UTF-8.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                encoding="utf-8" if _is_ascii(stream.encoding) else stream.encoding,
                errors="replace" if number == 0 else "backslashreplace",
            )


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def _handle_interrupts() -> None:
    """Raise KeyboardInterrupt on the first SIGINT only: a second one, in the cleanup that follows, ends the process at once."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
        raise KeyboardInterrupt

    # Not if it is ignored, as of a command in the background, and only the main thread may.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, interrupt)


def _rank() -> int:
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0


def add_template_options(add: Callable[..., Any]) -> None:
    """Add --template-option and --date by a parser's `add_argument`; `template_options` reads the first."""
    option_help = "variable for the template, as JSON, such as enable_thinking=false; repeatable"
    add("--template-option", action="append", default=[], metavar="NAME=VALUE", help=option_help)
    add("--date", metavar="YYYY-MM-DD", help="date for a template that asks for today's (default: 2024-07-26)")


def template_options(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, value) of each --template-option. Raises DataError for another form."""
    bad = next((option for option in given if "=" not in option), None)
    if bad:
        raise DataError(f"--template-option {bad!r} is not of the form NAME=VALUE, as in enable_thinking=false.")
    return tuple((name, value) for name, _, value in (option.partition("=") for option in given))


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
    """Whether the reader of standard output has closed it; otherwise the broken pipe was a different one."""
    output = select.poll()
    output.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def _leave(status: int, message: str | None) -> NoReturn:
    """End the process at once: interpreter teardown would add tracebacks from peers that wait in a collective."""
    with contextlib.suppress(OSError, ValueError):  # the disk that output goes to may be full, or its reader gone
        if message is not None:
            if len(message) > 2 * _HALF_MESSAGE:  # it may quote what a file says
                message = f"{message[:_HALF_MESSAGE]} … {message[-_HALF_MESSAGE:]}"
            say(message, error=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
