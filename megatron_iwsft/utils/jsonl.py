"""JSON Lines files that grow while a program runs: append, read, and repair after damage.

The valid lines at the start of a damaged file are kept. The complete file is moved to `NAME.damaged-1` (-2, …), so nothing is lost.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_iwsft.utils.files import atomic_write, move_aside
from megatron_iwsft.utils.text import printable_json

Row = dict[str, Any]
_LONGEST_LINE = 1 << 26  # bytes; beyond that a line is damage, such as a file full of zeros


def read_json_lines(path: Path, *, valid: Callable[[int, Row], bool] = lambda i, row: True) -> tuple[list[Row], str]:
    """The objects at the start of a file up to the first damaged line, and a sentence about that line; empty if there is none.

    valid(i, row): whether the i-th object, from 0, is one that this program wrote. Changes nothing. Raises OSError if the file cannot
    be opened, FileNotFoundError if it does not exist.
    """
    rows: list[Row] = []
    with _open_for_reading(path) as file:
        try:
            for _, row in _scan(file, valid):
                rows.append(row)
        except _Damage as damage:
            return rows, str(damage)
    return rows, ""


class JsonLines:
    """A file to which this process appends. `say` gets a sentence when the file had to be repaired.

    Every call opens the file anew, and first compares it with what the last call left: it may have been removed, truncated or replaced
    meanwhile. Links are not followed. Lines that cannot be written, as on a full disk, are kept and written by a later call.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], *, valid: Callable[[int, Row], bool] = lambda i, row: True
    ) -> None:
        self.path, self._say, self._valid = path, say, valid
        self._waiting = b""
        self._left: tuple[int, int, int] | None = None  # device, inode and size after the last call

    def read(self) -> list[Row]:
        """The objects in the file, which is repaired if it is damaged; none if there is no file. Raises OSError."""
        rows = self._repair()
        self._left = self._state()
        return rows

    def keep(self, condition: Callable[[Row], bool]) -> None:
        """Remove the objects for which the condition is false, also those not yet written. Raises OSError."""
        rows = self.read()
        lines = [line for line in self._waiting.splitlines(keepends=True) if condition(json.loads(line))]
        self._waiting = b"".join(lines)
        if not all(condition(row) for row in rows):
            self._rewrite(condition)
            self._left = self._state()

    def append(self, *rows: Row, durable: bool = False) -> None:
        """Write objects, each as one line. durable: also wait until they are on disk. Raises OSError; then the next call writes them."""
        self._waiting += b"".join(encode(row) for row in rows)
        self._settle()
        file = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
        )
        try:
            before = os.fstat(file)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(self.path))
            _write_all(file, self._waiting, before.st_size)
            self._waiting = b""
            if durable:
                os.fsync(file)
            after = os.fstat(file)
            self._left = after.st_dev, after.st_ino, after.st_size
        finally:
            os.close(file)

    def _settle(self) -> None:
        """Make sure that the file ends with a complete line, if it is not as the last call left it."""
        state = self._state()
        if self._left is not None and state == self._left:
            return
        if self._left is not None and (state is None or state[2] < self._left[2]):
            what = "was removed" if state is None else "was replaced or truncated"
            self._say(f"{self.path} {what} while this program was writing it. Its earlier lines are missing.")
        self._repair()

    def _state(self) -> tuple[int, int, int] | None:
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino, status.st_size

    def _repair(self) -> list[Row]:
        try:
            if not stat.S_ISREG(os.lstat(self.path).st_mode):
                aside = move_aside(self.path)
                self._say(f"{self.path} was not a regular file. It was moved to {aside.name}; a new file is started.")
                return []
            rows, damage = read_json_lines(self.path, valid=self._valid)
        except FileNotFoundError:
            return []
        if damage or not self._ends_with_newline():
            self._rewrite(lambda row: True, aside=bool(damage))
        return rows

    def _ends_with_newline(self) -> bool:
        with _open_for_reading(self.path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return size == 0 or file.read(1) == b"\n"

    def _rewrite(self, condition: Callable[[Row], bool], *, aside: bool = False) -> None:
        """Replace the file by its valid lines that meet the condition; with `aside`, keep the original under another name."""
        kept, damage = 0, None
        with _open_for_reading(self.path) as source, atomic_write(self.path, "wb") as target:
            try:
                for line, row in _scan(source, self._valid):
                    if condition(row):
                        target.write(line.rstrip(b"\r\n") + b"\n")
                        kept += 1
            except _Damage as found:
                damage = found
            if aside:  # before the new file takes the name
                copy = _second_name(self.path)
        if aside:
            self._say(
                f"{self.path} is damaged: {damage or 'unreadable'}. Its first {kept} valid lines are kept; the file as it was is now "
                f"{copy.name}."
            )


def encode(row: Row) -> bytes:
    """One object as a line of JSON. Numbers that are not finite become null, since JSON has none; other types become text."""
    return printable_json(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


class _Damage(Exception):
    """A line that cannot be one of this program's."""


def _scan(file: IO[bytes], valid: Callable[[int, Row], bool]) -> Iterator[tuple[bytes, Row]]:
    """Lines and their objects. Blank lines are skipped; a last line without a line break counts if it is complete."""
    count = 0
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise _Damage(f"line {number} is not UTF-8 text") from None
        except (ValueError, RecursionError):
            what = "is cut off" if not line.endswith(b"\n") and b"\0" not in line else "is not valid JSON"
            raise _Damage(f"line {number} {what}") from None
        if not isinstance(row, dict):
            raise _Damage(f"line {number} is not a JSON object")
        if not valid(count, row):
            raise _Damage(f"line {number} does not have the expected fields")
        yield line, row
        count += 1


def _open_for_reading(path: Path) -> IO[bytes]:
    """Open a regular file. A FIFO would otherwise block. Raises OSError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def _second_name(path: Path) -> Path:
    """Give a file a further name, `….damaged-N`: a link, or where there are no hard links the only name."""
    for number in range(1, 10_000):
        copy = path.with_name(f"{path.name}.damaged-{number}")
        try:
            os.link(path, copy)
            return copy
        except FileExistsError:
            continue
        except OSError:
            break
    return move_aside(path)


def _write_all(file: int, content: bytes, size: int) -> None:
    """Append; on failure, such as a full disk, remove what was written of it."""
    written = 0
    try:
        while written < len(content):
            written += os.write(file, content[written:])
    except OSError:
        if written and os.fstat(file).st_size == size + written:
            os.ftruncate(file, size)
        raise
