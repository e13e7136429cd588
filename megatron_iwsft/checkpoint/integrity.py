"""Checks before a checkpoint's files are read: only its own files, undamaged, that only trusted users could have written.

Checksums are part of the checkpoint, so they find damage, not malice. Ownership protects against malice: everything in the directory
must belong to this user, to root, or to a user named in IWSFT_TRUSTED_USERS, and nobody else may be able to write to it. What is
unpickled is restricted besides (pickles.py).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.utils.files import sha256_file

TRUSTED_USERS = "IWSFT_TRUSTED_USERS"
TRUSTED_GROUPS = "IWSFT_TRUSTED_GROUPS"
ADVICE = "Restore the checkpoint from a copy, or use an earlier one."  # for complaints of `damage`


class FileSum(TypedDict):
    bytes: int
    sha256: str


def file_sum(path: Path) -> FileSum:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def damage(directory: Path, files: Mapping[str, FileSum], names: Iterable[str], *, contents: bool = True) -> list[str]:
    """One complaint per file of `names` that is missing, truncated or (with `contents`) changed since it was written."""
    out = []
    for name in names:
        path, expected = directory / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                out.append(f"{path} is truncated: {size:,} bytes of {expected['bytes']:,}")
            elif contents and file_sum(path) != expected:
                out.append(f"{path} is damaged: its checksum does not match")
        except FileNotFoundError:
            out.append(f"{path} is missing")
        except OSError as error:
            out.append(f"{path} cannot be read: {error.strerror}")
    return out


def check_trust(directory: Path, listed: Iterable[str]) -> None:
    """Raise CheckpointError unless `directory` contains the files `listed` and nothing else, and only trusted users can write there.

    Missing files are no matter of trust: `damage` reports them.
    """
    check_entries(directory, names_below(directory), listed)


def names_below(directory: Path) -> list[str]:
    """`directory` itself, as ".", and everything below it, as names for `check_entries`. Reads names only, no inodes."""
    try:
        return [".", *_names_below(directory, "")]
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be listed: {error.strerror}. Check that the directory exists and that you may read it."
        ) from None


def _names_below(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            yield prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _names_below(Path(entry.path), f"{prefix}{entry.name}/")


def check_entries(directory: Path, names: Iterable[str], listed: Iterable[str]) -> None:
    """`check_trust` of some of the `names_below` a directory: several processes can share them out."""
    users, groups = _trusted_users(), _trusted_groups()
    allowed = set(listed)
    for name in names:
        path = directory / name
        status = os.lstat(path)
        _check_writers(path, status, users, groups, directory)
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{path} is {kind}. A checkpoint consists of files and directories; remove it.")
        if name not in allowed:
            raise CheckpointError(f"{path} is not part of the checkpoint: {INFO} does not list it. Remove it.")


def _check_writers(path: Path, status: os.stat_result, users: set[int], groups: set[int], directory: Path) -> None:
    why = "Megatron-Core's checkpoints contain Python pickles, which can run code when loaded."
    if status.st_uid not in users:
        name = _user_name(status.st_uid)
        raise CheckpointError(
            f"{path} belongs to {name}. {why} If you trust that user, set {TRUSTED_USERS}={name}, or copy the checkpoint."
        )
    if status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode):
        raise CheckpointError(
            f"{path} can be written by every user. {why} If you trust its content: chmod -R o-w {directory}"
        )
    if status.st_mode & stat.S_IWGRP and status.st_gid not in groups and not stat.S_ISLNK(status.st_mode):
        name = _group_name(status.st_gid)
        raise CheckpointError(
            f"{path} can be written by the group {name}. {why} If you trust that group, set {TRUSTED_GROUPS}={name}; if you trust only "
            f"the content: chmod -R g-w {directory}"
        )


def _trusted_users() -> set[int]:
    return {0, os.geteuid()} | _named(TRUSTED_USERS, lambda name: pwd.getpwnam(name).pw_uid, "user")


def _trusted_groups() -> set[int]:
    """Root's; this user's own group, if nobody else is in it; and those named in the environment."""
    found = {0} | _named(TRUSTED_GROUPS, lambda name: grp.getgrnam(name).gr_gid, "group")
    try:
        me = pwd.getpwuid(os.geteuid())
        own = grp.getgrgid(me.pw_gid)
        if own.gr_name == me.pw_name and set(own.gr_mem) <= {me.pw_name}:
            found.add(me.pw_gid)
    except KeyError:  # a user without an entry, as in some containers
        pass
    return found


def _named(variable: str, identify: Callable[[str], int], kind: str) -> set[int]:
    out = set()
    for name in filter(None, os.environ.get(variable, "").split(",")):
        try:
            out.add(int(name) if name.isdigit() else identify(name))
        except KeyError:
            raise CheckpointError(
                f"{variable} names {name}, which is not a {kind} of this machine. Correct the variable, or unset it."
            ) from None
    return out


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
