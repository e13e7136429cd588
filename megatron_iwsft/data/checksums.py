"""Checksums of a corpus's files: SHA-256 of each file and, for a long file, of each of its 64 MiB blocks.

Blocks let ranks share the work of checking one long file, and let a check read a sample of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_iwsft.utils.files import open_regular
from megatron_iwsft.utils.json_files import is_regular_file
from megatron_iwsft.utils.text import printable_line

BLOCK_BYTES = 1 << 26
_UNSHOWN_S = 2.0  # what takes less than this shows no progress


class Checksum:
    """SHA-256 of the bytes given to `update`. `blocks` is empty if there is only one block, whose sum is the file's."""

    def __init__(self) -> None:
        self._file = hashlib.sha256()
        self._block: Any = None  # in the first block the sum is the file's
        self._blocks: list[str] = []
        self._room = BLOCK_BYTES  # bytes left in the current block

    def update(self, data: Any) -> None:
        """Add bytes, or anything that supports the buffer protocol."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view) > self._room:
            self._add(view[: self._room])
            view = view[self._room :]
            self._blocks.append((self._block or self._file).hexdigest())
            self._block, self._room = hashlib.sha256(), BLOCK_BYTES
        self._add(view)
        self._room -= len(view)

    def _add(self, view: memoryview) -> None:
        self._file.update(view)
        if self._block is not None:
            self._block.update(view)

    @property
    def file(self) -> str:
        return self._file.hexdigest()

    @property
    def blocks(self) -> list[str]:
        return [*self._blocks, self._block.hexdigest()] if self._blocks else []


def checksum_file(path: Path) -> Checksum:
    """The checksum of an existing file. Raises OSError."""
    checksum = Checksum()
    with open_regular(path) as file:
        while data := file.read(1 << 22):
            checksum.update(data)
    return checksum


@dataclass
class Checksums:
    """Of several files: name → SHA-256, and name → SHA-256 of each block for those of more than one block."""

    files: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, checksum: Checksum) -> None:
        self.files[name] = checksum.file
        if checksum.blocks:
            self.blocks[name] = checksum.blocks

    def update(self, other: Checksums) -> None:
        self.files |= other.files
        self.blocks |= other.blocks


@dataclass(frozen=True)
class Piece:
    """A part of a file that is checked at once: `size` bytes from `start`; size None: up to the end of the file."""

    name: str
    start: int
    size: int | None
    sha256: str


def pieces_of(files: Mapping[str, str], blocks: Mapping[str, Sequence[str]]) -> list[Piece]:
    """The pieces of all files, in order."""
    out = []
    for name in sorted(files):
        sums = blocks.get(name) or [files[name]]
        for k, expected in enumerate(sums):
            size = BLOCK_BYTES if k < len(sums) - 1 else None
            out.append(Piece(name, k * BLOCK_BYTES, size, expected))
    return out


def damaged_files(
    directory: Path,
    pieces: Iterable[Piece],
    *,
    changed: str,
    look_at: Callable[[Piece, int, bytes], str | None] = lambda piece, start, data: None,
    show_progress: bool = False,
) -> list[str]:
    """One complaint per file of `pieces` that is missing, not a regular file, or differs from its checksum. Reads all of them.

    `look_at` gets the content too, in parts of at most 64 MiB with their place in the file, and may return a complaint.
    `changed` is the complaint about a wrong checksum, after the file's path. `show_progress`: a bar, where there is a terminal.
    """
    out: dict[str, str] = {}
    pieces = list(pieces)
    bar = tqdm(
        total=bytes_of(directory, pieces),
        desc=f"checking {printable_line(directory.name)}",
        unit="B",
        unit_scale=True,
        delay=_UNSHOWN_S,
        disable=None if show_progress else True,
    )

    def seen(piece: Piece, start: int, data: bytes) -> str | None:
        bar.update(len(data))
        return look_at(piece, start, data)

    with bar:
        for piece in pieces:
            if piece.name in out:
                continue
            path = directory / piece.name
            try:
                complaint = _complaint(path, piece, changed, seen)
            except FileNotFoundError:
                complaint = "is missing"
            except OSError as error:
                complaint = f"cannot be read: {error.strerror}"
            if complaint is not None:
                out[piece.name] = f"{path} {complaint}"
    return list(out.values())


def bytes_of(directory: Path, pieces: Iterable[Piece]) -> int:
    """How many bytes of the files in `directory` the pieces have; a missing file has none."""
    total = 0
    for piece in pieces:
        if piece.size is not None:
            total += piece.size
        else:
            with suppress(OSError):
                total += max(0, (directory / piece.name).stat().st_size - piece.start)
    return total


def _complaint(
    path: Path, piece: Piece, changed: str, look_at: Callable[[Piece, int, bytes], str | None]
) -> str | None:
    digest, at, found = hashlib.sha256(), piece.start, None
    if path.exists() and not is_regular_file(path):
        return "is not a regular file"
    with open_regular(path) as file:
        file.seek(piece.start)
        while data := file.read(BLOCK_BYTES if piece.size is None else piece.start + piece.size - at):
            digest.update(data)
            complaint = look_at(piece, at, data)
            found = found or complaint
            at += len(data)
    return changed if digest.hexdigest() != piece.sha256 else found
