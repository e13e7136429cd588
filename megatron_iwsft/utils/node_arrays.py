"""Large arrays that the processes of a job on one node have one copy of: one process computes them, the others map its files.

No process group is involved, so this works before a job is joined, and in threads. The files are in the node's temporary directory,
and are removed as soon as every process of the node has mapped them: the mappings remain. Files of a job that is killed before that
are removed by the next one on the node.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from megatron_iwsft.utils.files import process_runs, this_machine
from megatron_iwsft.utils.text import say

Arrays = dict[str, np.ndarray]


def node_arrays(key: str, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays that `compute` returns. In jobs with several processes on this node (torchrun's LOCAL_WORLD_SIZE), those that one parent
    has started share them, read-only.

    key: everything that the arrays depend on. Raises what `compute` raises, in each process. Where files cannot be shared, every process
    computes arrays of its own, and the first one says why.
    """
    processes, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("LOCAL_RANK", "0")
    if processes == 1:
        return compute()
    computed: Arrays | None = None
    try:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        with _locked(_job_directory() / f"{name}.lock") as lock:
            content = lock.with_suffix("")
            if not content.exists():
                computed = compute()
                _write(computed, content)
                computed = None  # before the mapping, so that there is one copy at a time
            arrays = {file.stem: _mapped(file) for file in content.iterdir()}
            with open(lock, "a+", encoding="ascii") as seen_by:  # the ranks that have the arrays
                seen_by.write(f"{rank} ")
                seen_by.seek(0)
                if len(set(seen_by.read().split())) >= processes:
                    shutil.rmtree(content, ignore_errors=True)
                    lock.unlink()
            return arrays
    except OSError as error:
        if rank == "0":
            say(
                f"cannot share data with this node's other processes in {tempfile.gettempdir()}: {error.strerror or error}. Each of the "
                f"{processes} processes on this node keeps a copy. Set TMPDIR to a directory on a local disk with free space."
            )
        return compute() if computed is None else computed


def _job_directory() -> Path:
    """A directory for this job's part on this node, in one that only this user can enter. Those of jobs that are gone are removed."""
    own = Path(tempfile.gettempdir()) / f"iwsft-{os.geteuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    status = own.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(f"{own} is not a directory that belongs to this user alone")
    for entry in os.scandir(own):
        machine, _, parent = entry.name.partition("-")
        if machine == this_machine() and parent.isdigit() and not process_runs(int(parent)):
            shutil.rmtree(entry.path, ignore_errors=True)
    directory = own / f"{this_machine()}-{os.getppid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Hold the lock of a file that its last user removes. Waits for it."""
    while True:
        with open(path, "a", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Else the process that held it has removed it, and another one may have created a new one.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield path
                return


def _write(arrays: Arrays, directory: Path) -> None:
    """Write each array to a file of its own, in a directory that appears when all are complete."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r").view(np.ndarray)
    except ValueError:  # an empty array cannot be mapped
        return np.asarray(np.load(file))
