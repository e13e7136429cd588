"""Errors meant for people. Each message says what was expected, what was found, where, and the way out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: printed as one message, without a traceback, with exit status 2."""


class ConfigError(UserError):
    """A config file, a command-line override or an argument is wrong."""


class DataError(UserError):
    """A record, tokenizer, corpus directory or reference sidecar is wrong."""


class CheckpointError(UserError):
    """A checkpoint or Hugging Face directory is missing, damaged or of another model."""


class DivergenceError(UserError):
    """Training gave a loss or gradient that is not a finite number."""


EXIT_USER_ERROR = 2


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its status; a `UserError` becomes one message on standard error.

    Under torchrun most mistakes are met by every rank: rank 0 speaks first, torchrun then ends the others, and only a
    rank that failed alone is left to print its own.
    """
    try:
        status = main()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(3)
        where = f" (rank {rank})" if rank > 0 else ""
        print(f"{type(error).__name__}{where}: {error}", file=sys.stderr, flush=True)
        # Skips interpreter teardown, where peers waiting in a collective would each add a traceback of their own.
        sys.stdout.flush()
        os._exit(EXIT_USER_ERROR)
    except OSError as error:
        print(f"{error.strerror}: {error.filename}" if error.filename else str(error), file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status or 0)
