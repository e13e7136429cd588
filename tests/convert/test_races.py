"""Exports that run at once, are killed, or fail: a published directory is complete, and nothing partial stays behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit, SafetensorsDirectory, write_directory
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.utils import files
from megatron_iwsft.utils.files import PARTIAL, atomic_directory, atomic_write
from tests.support import tiny

ARCHITECTURE = Architecture.from_hf(tiny.model_config(num_hidden_layers=1), where="test")


def export(output: Path, *, meanwhile=lambda: None, exist_ok: bool = False, finish=lambda partial: None) -> None:
    source = RandomInit(ARCHITECTURE, seed=0)

    def read(name: str) -> Tensor:
        meanwhile()
        return source.read(name, (0, 0, shapes(ARCHITECTURE)[name][0]))

    names = list(shapes(ARCHITECTURE))
    write_directory(
        output,
        ARCHITECTURE,
        read,
        names=names,
        dtype=torch.float32,
        finish=finish,
        exist_ok=exist_ok,
        shard_bytes=60_000,
    )


def is_complete(directory: Path) -> bool:
    SafetensorsDirectory(directory)
    found = {name for file in directory.glob("*.safetensors") for name in load_file(file)}
    return found == set(shapes(ARCHITECTURE)) and (directory / "config.json").exists()


def test_of_two_exports_at_once_the_first_to_finish_wins(tmp_path: Path) -> None:
    output, began, finished = tmp_path / "hf", threading.Event(), threading.Event()
    errors: list[str] = []

    def slow() -> None:
        def wait() -> None:
            began.set()
            assert finished.wait(60)

        try:
            export(output, meanwhile=wait)
        except CheckpointError as error:
            errors.append(str(error))

    thread = threading.Thread(target=slow)
    thread.start()
    assert began.wait(60)
    export(output)
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    finished.set()
    thread.join()
    assert len(errors) == 1 and "another process has written" in errors[0] and "was discarded" in errors[0]
    assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before
    assert is_complete(output)
    assert os.listdir(tmp_path) == ["hf"]


def _export_after(barrier, output: str) -> None:
    torch.set_num_threads(1)
    barrier.wait()
    export(Path(output), exist_ok=True)


@pytest.mark.parallel
def test_many_processes_export_to_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    processes = [context.Process(target=_export_after, args=(barrier, str(tmp_path / "hf"))) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 6
    assert is_complete(tmp_path / "hf")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("exist_ok", [True, False])
@pytest.mark.parametrize("kind", ["file", "dangling link", "directory"])
def test_something_else_under_the_name_is_not_replaced(kind: str, exist_ok: bool, tmp_path: Path) -> None:
    output = tmp_path / "hf"

    def appear() -> None:
        if os.path.lexists(output):
            return
        if kind == "file":
            output.write_text("precious")
        elif kind == "dangling link":
            output.symlink_to(tmp_path / "nowhere")
        else:
            output.mkdir()
            (output / "precious").touch()

    if kind == "directory" and exist_ok:
        export(output, meanwhile=appear, exist_ok=True)
    else:
        with pytest.raises(CheckpointError, match="another process has written"):
            export(output, meanwhile=appear, exist_ok=exist_ok)
        with pytest.raises(CheckpointError, match=r"already exists|another process has written"):
            export(output, exist_ok=exist_ok)
    assert os.listdir(tmp_path) == ["hf"]
    assert kind != "file" or output.read_text() == "precious"
    assert kind != "directory" or os.listdir(output) == ["precious"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing(number: int, tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        assert partial.parent == tmp_path and partial.name.endswith(PARTIAL)
        raise OSError(number, os.strerror(number), str(partial / "x"))

    with pytest.raises(CheckpointError, match=rf"cannot write .*hf: {os.strerror(number)}"):
        export(tmp_path / "hf", finish=fail)
    for error in (KeyboardInterrupt, MemoryError, RuntimeError):

        def interrupt(partial: Path, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            export(tmp_path / "hf", finish=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_nearly_too_long(tmp_path: Path) -> None:
    for name in ("x" * 250, "列" * 80):
        export(tmp_path / name)
        assert is_complete(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_iwsft.utils.files import atomic_directory, atomic_write
with atomic_directory(Path(sys.argv[1])) as directory, atomic_write(Path(sys.argv[1] + ".json")) as file:
    (directory / "a").write_text("half")
    print(directory.name, flush=True)
    signal.pause()
"""


@pytest.mark.command
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = process.stdout.readline().strip()

    def write_both() -> None:
        with atomic_directory(path) as directory:
            (directory / "a").touch()
        shutil.rmtree(path)
        with atomic_write(tmp_path / "hf.json") as file:
            file.write("{}")

    write_both()  # a process that runs keeps its files
    assert len(list(tmp_path.glob(f".hf*{PARTIAL}"))) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()

    # Of another machine, and of another directory: not known to be left behind.
    elsewhere = left.replace(files.this_machine(), "0" * 8)
    others = [elsewhere, left.replace(".hf.", ".hf2."), ".hf.partial", "hf.partial", ".hf.x-1-y.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    write_both()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "hf.json"])

    # Of another machine, but a day old; a file in it that is newer speaks for a process at work.
    old = time.time() - 2 * 86400
    (tmp_path / elsewhere / "a").touch()
    os.utime(tmp_path / elsewhere, (old, old))
    write_both()
    assert (tmp_path / elsewhere).exists()
    os.utime(tmp_path / elsewhere / "a", (old, old))
    os.utime(tmp_path / elsewhere, (old, old))
    write_both()
    assert not (tmp_path / elsewhere).exists()


def test_a_link_under_a_left_behind_name_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").touch()
    name = f".hf.{files.this_machine()}-{2**22 + 1}-00000000{PARTIAL}"  # above the largest process id
    (tmp_path / name).symlink_to(precious)
    with atomic_directory(tmp_path / "hf"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["hf", "precious"] and os.listdir(precious) == ["a"]


def test_a_planted_link_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for single_writer in (False, True):
        for planted in ("latest", f"latest{PARTIAL}"):
            (tmp_path / planted).unlink(missing_ok=True)
            (tmp_path / planted).symlink_to(victim)
            with atomic_write(tmp_path / "latest", single_writer=single_writer) as file:
                file.write("new")
            assert (tmp_path / "latest").read_text() == "new" and not (tmp_path / "latest").is_symlink()
            assert victim.read_text() == "precious"
