"""Locks that keep two commands from writing the same directory or file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.locks import LOCK, exclusive


@pytest.mark.parametrize("name", [None, "a.jsonl"])
def test_a_second_holder_is_refused(name: str | None, tmp_path: Path) -> None:
    refusal = rf"is in use by another job \(process {os.getpid()} on"
    with exclusive(tmp_path, DataError, name=name):  # noqa: SIM117
        with pytest.raises(DataError, match=refusal), exclusive(tmp_path, DataError, name=name):
            pass
    with exclusive(tmp_path, DataError, name=name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_of_one_directory_are_locked_separately(tmp_path: Path) -> None:
    with exclusive(tmp_path, DataError, name="a"), exclusive(tmp_path, DataError, name="b"):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".a.lock", ".b.lock"]


def test_a_directory_stays_locked_when_the_file_is_removed(tmp_path: Path) -> None:
    with exclusive(tmp_path, DataError):
        (tmp_path / LOCK).unlink()
        with pytest.raises(DataError, match="is in use by another job"), exclusive(tmp_path, DataError):
            pass
