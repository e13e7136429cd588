"""Files that appear complete or not at all, and fingerprints of large files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_iwsft.utils.files import (
    atomic_write,
    partial_path,
    publish,
    remove_directory,
    sampled_fingerprint,
    write_json,
    write_text,
)


@pytest.mark.parametrize("single_writer", [False, True])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_leaves_the_old_file_and_no_partial_one(
    before: str | None, single_writer: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(ValueError, match="halfway"), atomic_write(path, single_writer=single_writer) as file:
        file.write("new")
        file.flush()
        raise ValueError("halfway")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({} if before is None else {"file.txt": before})


@pytest.mark.parametrize("single_writer", [False, True])
def test_a_file_changes_only_when_the_block_ends(single_writer: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path, "wb", single_writer=single_writer) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_single_writer_overwrites_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    partial_path(path).write_text("left by a killed run, and longer than the new text")
    write_text(path, "new", single_writer=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file.txt": "new"}


def write_repeatedly(path: Path, letter: str) -> None:
    for _ in range(100):
        write_text(path, letter * 10_000)


@pytest.mark.parallel
def test_with_two_writers_the_file_is_always_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "a" * 10_000)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        writers = [pool.submit(write_repeatedly, path, letter) for letter in "ab"]
        seen = set()
        while not all(writer.done() for writer in writers):
            seen.add(path.read_text())
        for writer in writers:
            writer.result()
    assert seen | {path.read_text()} <= {"a" * 10_000, "b" * 10_000}
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_raises_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError), atomic_write(tmp_path / "missing" / "file.txt"):
        pass


def test_json_is_written_as_utf_8(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"b": "für", "a": [1]}, sort_keys=True)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1], "b": "für"}
    assert "für" in text and text.index('"a"') < text.index('"b"') and text.endswith("}\n")


def test_publish_replaces_a_file_and_names_a_directory(tmp_path: Path) -> None:
    file, partial = tmp_path / "file", tmp_path / "file.partial"
    file.write_text("old")
    partial.write_text("new")
    publish(partial, file)
    directory, partial = tmp_path / "directory", tmp_path / "directory.partial"
    partial.mkdir()
    (partial / "inside").write_text("complete")
    publish(partial, directory)
    assert file.read_text() == "new" and (directory / "inside").read_text() == "complete"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


def test_removing_a_directory_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    directory.mkdir()
    (directory / "file").touch()
    remove_directory(directory)
    remove_directory(directory)  # another process was faster
    assert list(tmp_path.iterdir()) == []


def test_two_processes_remove_directories_of_one_name(tmp_path: Path, monkeypatch) -> None:
    """While the first one removes its files, the second one removes a new directory of that name."""
    directory, remove = tmp_path / "step-1", shutil.rmtree

    def meanwhile(path: Path, **options: bool) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        directory.mkdir()
        remove_directory(directory)
        assert list(tmp_path.iterdir()) == [path]
        remove(path, **options)

    directory.mkdir()
    monkeypatch.setattr(shutil, "rmtree", meanwhile)
    remove_directory(directory)
    assert list(tmp_path.iterdir()) == []


BLOCK = 65536
SIZE = 3 * 64 * BLOCK  # three times what is sampled


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\x01")

    return change


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: path.rename(path.with_name("other.safetensors")), id="name"),
        pytest.param(append, id="size"),
        pytest.param(flip(0), id="first byte"),
        pytest.param(flip(BLOCK - 1), id="end of the first block"),
        pytest.param(flip(SIZE - BLOCK), id="start of the last block"),
        pytest.param(flip(SIZE - 1), id="last byte"),
        pytest.param(flip((SIZE - BLOCK) * 31 // 63), id="a sampled block in the middle"),
        pytest.param(lambda path: (path.parent / "second.safetensors").write_bytes(b"x"), id="another file"),
    ],
)
def test_a_sampled_fingerprint_changes_with_name_size_and_content(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(SIZE))
    before = sampled_fingerprint(tmp_path, "*.safetensors")
    assert sampled_fingerprint(tmp_path, "*.safetensors") == before
    change(path)
    assert sampled_fingerprint(tmp_path, "*.safetensors") != before


def test_a_sampled_fingerprint_depends_on_matching_files_only(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short: both ends are the same block")
    before = sampled_fingerprint(tmp_path, "*.safetensors")
    (tmp_path / "README.md").write_text("other")
    assert sampled_fingerprint(tmp_path, "*.safetensors") == before
    flip(3)(tmp_path / "model.safetensors")
    assert sampled_fingerprint(tmp_path, "*.safetensors") != before
