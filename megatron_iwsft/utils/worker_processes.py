"""Settings for worker processes of a command: one thread each, forked from a process that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def one_thread_each() -> None:
    """Make libraries of this process's children use one thread: parallelism comes from the processes."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def start_forkserver(modules: Sequence[str]) -> None:
    """Choose how this program starts processes: from a new process, already starting, that imports `modules` once for all of them.

    For commands, not for libraries: it applies to the entire program.
    """
    one_thread_each()
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def worker_context() -> BaseContext:
    """The program's choice of how to start processes, but never by fork alone: the program may have threads."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return multiprocessing.get_context("forkserver" if chosen == "forkserver" else "spawn")
