"""Files and directories that appear complete or not at all: written under a temporary name, flushed to disk, then renamed.

A temporary name that is not a `partial_path` is unique and says which process of which machine uses it. What a killed process left
is removed when the same file is written again, if that process is known to be gone or has written nothing for a day.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

PARTIAL = ".partial"
_HASH_BLOCK = 1 << 22
_SAMPLES = 64
_SAMPLE_BYTES = 65536
_NAME_BYTES = 200  # of a file name within its temporary name; a name has 255 at most
_STALE_S = 86400.0


_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_kind(path: Path, *, follow_links: bool = True) -> str | None:
    """What `path` is if not a regular file ("a FIFO"); None for a regular file. Raises OSError if there is nothing."""
    return _KINDS.get(stat.S_IFMT(os.stat(path, follow_symlinks=follow_links).st_mode))


def open_regular(path: Path, *, buffering: int = -1) -> Any:
    """Open a regular file, or a link to one, for reading. Raises OSError for anything else: reading a FIFO or a device can block."""
    kind = other_kind(path)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return open(path, "rb", buffering=buffering)


def read_regular(path: Path) -> bytes:
    """The content of a regular file; raises as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def foreign_entry(directory: Path) -> tuple[Path, str] | None:
    """The first entry below `directory` that is neither a regular file nor a directory, and what it is.

    Programs that write into a directory check it first: a symbolic link there would redirect the write to another file.
    """
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                found = foreign_entry(path)
                if found is not None:
                    return found
            else:
                kind = other_kind(path, follow_links=False)
                if kind is not None:
                    return path, kind
    return None


def partial_path(path: Path) -> Path:
    """The temporary name of a file that only one process writes and that an interrupted run may find again."""
    return path.with_name(path.name + PARTIAL)


def publish(partial: Path, path: Path) -> None:
    """Give a complete file or directory its name, once a file's content is on disk: renaming must not come first."""
    if partial.is_file():
        flush_to_disk(partial)
    os.replace(partial, path)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "w", *, single_writer: bool = False) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only if the block ends without an exception.

    Text is UTF-8. `single_writer`: only one process writes this file, so it is written at `partial_path`, which the next run
    overwrites if this process is killed. Otherwise the temporary name is unique: two processes may write the same file at
    once, and the last rename wins. A link at `path` is replaced, not followed. Raises OSError; then no file is left behind, and an
    existing file is unchanged.
    """
    if single_writer:
        partial = partial_path(path)
        partial.unlink(missing_ok=True)
    else:
        _remove_stale(path)
        partial = _unique_partial(path)
    exclusive: Any = mode.replace("w", "x")  # follows no link that somebody else put there
    try:
        with open(partial, exclusive, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new empty directory, to be filled in the block, that appears as `path` only if the block ends without an exception.

    Several processes may do this at once; the first to finish wins. Raises FileExistsError if there is something at `path` after the
    block. On any exception the directory is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    partial = _unique_partial(path)
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                flush_to_disk(file)
        try:
            os.rename(partial, path)
        except OSError:
            if os.path.lexists(path):
                raise FileExistsError(f"{path} already exists") from None
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_aside(path: Path) -> Path:
    """Rename a damaged file, or whatever else is at `path`, to the first free name `….damaged-1`, `….damaged-2`, …; returns that."""
    for number in range(1, 10_000):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not os.path.lexists(aside):
            os.rename(path, aside)
            return aside
    raise FileExistsError(f"{path}: too many damaged files beside it")


def open_for_writing(path: Path, flags: int) -> IO[str]:
    """Open or create a text file with the flags of `os.open`. A link, or whatever else is not a file, is moved aside first."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        move_aside(path)
    file = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    mode = "a+" if flags & os.O_APPEND else "w"
    return open(file, mode, encoding="utf-8")


def _unique_partial(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}{this_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL}")


def _stem(path: Path) -> str:
    return f".{os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])}."


@cache
def this_machine() -> str:
    """Identifies where process ids mean the same: this boot of this machine, and the PID namespace."""
    parts = []
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8] if parts else uuid.uuid4().hex[:8]


def _remove_stale(path: Path) -> None:
    """Remove what killed processes of this user left of `path` under temporary names."""
    name = re.compile(re.escape(_stem(path)) + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}" + re.escape(PARTIAL))
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = name.fullmatch(entry.name)
            if found and _is_stale(entry, found[1], int(found[2])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _is_stale(entry: os.DirEntry[str], machine: str, process: int) -> bool:
    status = entry.stat(follow_symlinks=False)
    if status.st_uid != os.geteuid():
        return False
    if machine == this_machine() and not process_runs(process):
        return True
    written = status.st_mtime
    if stat.S_ISDIR(status.st_mode):
        with os.scandir(entry.path) as files:
            written = max([written, *(file.stat(follow_symlinks=False).st_mtime for file in files)])
    return time.time() - written > _STALE_S


def process_runs(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def write_text(path: Path, text: str, *, single_writer: bool = False) -> None:
    """Write a text file atomically."""
    with atomic_write(path, single_writer=single_writer) as file:
        file.write(text)


def write_json(
    path: Path, value: object, *, indent: int | None = 1, sort_keys: bool = False, single_writer: bool = False
) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=sort_keys) + "\n"
    write_text(path, text, single_writer=single_writer)


def remove_directory(directory: Path) -> None:
    """Remove a directory: first its name, so that an incomplete one is never taken for a complete one.

    Several processes may do this at once: a directory that another one has removed is no error.
    """
    doomed = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with suppress(FileNotFoundError):
        os.rename(directory, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sampled_fingerprint(directory: Path, pattern: str) -> str:
    """Identity of large files in a directory: name, size, both ends and 64 evenly spaced blocks of 64 KiB of each.

    Reading all of a 64 GB model at every start would take minutes; training changes every block, so samples show a change.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob(pattern)):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            last = max(0, size - _SAMPLE_BYTES)
            # In floating point: sidecars name models by these positions.
            for at in sorted({int(k * (last / (_SAMPLES - 1))) for k in range(_SAMPLES - 1)} | {last}):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
