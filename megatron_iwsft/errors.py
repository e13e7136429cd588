"""The exceptions that end a command, and its exit statuses. A message for people says what was expected, what was found, where,
and what to do."""

from __future__ import annotations


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


class RequeueError(Exception):
    """The run was told to stop, has saved and said so, and is not finished: to be started again as it was."""


class PeerError(Exception):
    """Another rank has failed first, and has said why."""


EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_UNREAD = 128 + 13  # what a shell calls an end by SIGPIPE
