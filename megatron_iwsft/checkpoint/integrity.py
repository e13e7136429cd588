"""Whether a checkpoint's files are the ones that were written, and whose they are; asked before anything is unpickled.

Checksums stand in the checkpoint's own info file: they find damage, not malice. What guards against malice is ownership: only
files of this user, of root, or of a user named in IWSFT_TRUSTED_USERS are read as pickles.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.files import sha256_file

TRUSTED_USERS = "IWSFT_TRUSTED_USERS"


class FileSum(TypedDict):
    bytes: int
    sha256: str


def file_sum(path: Path) -> FileSum:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def damage(directory: Path, files: Mapping[str, FileSum], names: Iterable[str], *, contents: bool = True) -> list[str]:
    """One complaint for each of `names` that is missing, truncated or (with `contents`) changed since it was written."""
    out = []
    for name in names:
        path, expected = directory / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                out.append(f"{path} is truncated: {size:,} bytes of {expected['bytes']:,}")
            elif contents and file_sum(path) != expected:
                out.append(f"{path} is damaged: its checksum is not the one it was written with")
        except FileNotFoundError:
            out.append(f"{path} is missing")
        except OSError as error:
            out.append(f"{path} cannot be read: {error.strerror}")
    return out


def check_owner(directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if a file that will be unpickled could have been written by someone who is not trusted."""
    trusted = _trusted_users()
    for path in (directory, *(directory / name for name in names)):
        try:
            status = path.stat()
        except OSError:
            continue  # missing: the checksums say so
        if status.st_uid not in trusted:
            raise CheckpointError(
                f"{path} belongs to {_name(status.st_uid)}. Megatron-Core's checkpoints hold Python pickles, which can run code when "
                f"they are read. If you trust that user, set {TRUSTED_USERS}={_name(status.st_uid)}, or make a copy of your own."
            )
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise CheckpointError(
                f"{path} can be written by every user, and holds Python pickles, which can run code when they are read. "
                f"If you know what it holds: chmod -R o-w {directory}"
            )


def _trusted_users() -> set[int]:
    out = {0, os.geteuid()}
    for user in filter(None, os.environ.get(TRUSTED_USERS, "").split(",")):
        try:
            out.add(int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid)
        except KeyError:
            raise CheckpointError(f"{TRUSTED_USERS} names {user}, a user that this machine does not know.") from None
    return out


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
