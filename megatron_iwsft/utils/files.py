"""Files that appear complete or not at all: written under a temporary name, flushed to disk, then renamed; and their checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

PARTIAL = ".partial"
_HASH_BLOCK = 1 << 22
_SAMPLES = 64
_SAMPLE_BYTES = 65536


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
    overwrites if this process is killed. Otherwise the temporary name is random: two processes may write the same file at
    once, and the last rename wins. Raises OSError; then no file is left behind, and an existing file is unchanged.
    """
    random_name = f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    partial = partial_path(path) if single_writer else path.with_name(random_name)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    """Remove a directory: first its name, so that an incomplete one is never taken for a complete one."""
    doomed = directory.with_name(f"{directory.name}.removed{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
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
            for at in sorted({last * k // (_SAMPLES - 1) for k in range(_SAMPLES)}):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
