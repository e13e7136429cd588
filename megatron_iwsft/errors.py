"""Exceptions that end a command, and exit statuses. Messages say what was expected, what was found, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can fix: printed as one message, without a traceback, with exit status 2."""


class ConfigError(UserError):
    """A config file, a command-line override or an argument is wrong."""


class DataError(UserError):
    """A record, tokenizer, corpus directory or reference sidecar is wrong."""


class CheckpointError(UserError):
    """A checkpoint or Hugging Face directory is missing, damaged or of another model."""


class DamageError(CheckpointError):
    """A checkpoint's file is not as it was written. An earlier checkpoint of the run may be intact."""


class DivergenceError(UserError):
    """Training gave a loss or gradient that is not a finite number."""


class RequeueError(Exception):
    """The run was asked to stop and has saved; start it again to continue."""


class PeerError(Exception):
    """Another rank failed first and reported why."""


EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_UNREAD = 128 + 13  # a shell's status for SIGPIPE
EXIT_INTERRUPTED = 128 + 2  # and for SIGINT
