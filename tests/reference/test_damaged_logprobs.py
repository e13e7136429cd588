"""Damaged sidecars of reference log-probs are refused, and links in them are not followed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iwsft.data import checksums
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.reference import sidecar as module
from megatron_iwsft.reference.sidecar import ReferenceIdentity, Sidecar, SidecarWriter
from tests.support import run_python, tiny
from tests.support.damage import edit_array, edit_json
from tests.support.launched_runs import write_config
from tests.support.small_disk import on_small_disk

IDENTITY = ReferenceIdentity("weights", "tokenizer", "none", "fp32")
LENGTHS = [20, 30, 25, 40]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tiny.token_corpus(tmp_path, LENGTHS).directory


def write_sidecar(corpus: Corpus) -> Path:
    writer = SidecarWriter(corpus, IDENTITY)
    with writer.lock():
        writer.prepare()
        for shard in corpus.shards:
            np.zeros(sum(LENGTHS), np.float32).tofile(writer._partial(shard))
        writer.open()
        writer.finish({})
    return writer.directory


def test_ranks_share_the_check_of_a_sidecar(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 64 bytes, as if it were large: each of two ranks reads half."""
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    opened = Corpus.open(corpus)
    directory = write_sidecar(opened)
    read: list[int] = []
    original = module.damaged_files

    def counted(*args: Any, **options: Any) -> list[str]:
        return original(*args, **options, look_at=lambda piece, start, data: read.append(len(data)))

    monkeypatch.setattr(module, "damaged_files", counted)
    sidecar, shares = Sidecar(opened, IDENTITY), []
    for rank in (0, 1):
        read.clear()
        assert sidecar.damage(rank, 2) == []
        shares.append(sum(read))
    files = [path for path in directory.iterdir() if path.suffix in (".bin", ".idx")]
    assert sum(shares) == sum(path.stat().st_size for path in files)
    assert max(shares) - min(shares) <= 128
    edit_array(directory / "shard-00000.bin", np.float32, lambda values: values.__setitem__(20, -1.0))
    assert sorted(len(sidecar.damage(rank, 2)) for rank in (0, 1)) == [0, 1]


SIDECAR_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "name outside": (
        lambda d: edit_json(d / "manifest.json", files={"../manifest.json": "0" * 64}),
        "is not a plain file name",
    ),
    "no files": (lambda d: edit_json(d / "manifest.json", files={}), "it has no checksum of shard-00000"),
    "odd types": (lambda d: edit_json(d / "manifest.json", files=3), "damaged: files"),
    "a link": (lambda d: (d / "more").symlink_to("/etc/passwd"), "more is a symbolic link"),
    "a FIFO": (lambda d: os.mkfifo(d / "more"), "more is a FIFO"),
    "values changed": (
        lambda d: edit_array(d / "shard-00000.bin", np.float32, lambda values: values.fill(-1)),
        "its checksum does not match",
    ),
}


@pytest.mark.parametrize("attack", SIDECAR_ATTACKS)
def test_damaged_reference_logprobs_are_refused_by_name(attack: str, corpus: Path) -> None:
    apply, message = SIDECAR_ATTACKS[attack]
    opened = Corpus.open(corpus)
    directory = write_sidecar(opened)
    assert Sidecar(opened, IDENTITY).damage(0, 1) == []
    apply(directory)
    try:
        said = "\n".join(Sidecar(opened, IDENTITY).damage(0, 1))
    except DataError as error:
        said = str(error)
    assert re.search(message, said), said


@pytest.mark.parametrize("linked", ["directory", "file"])
def test_links_do_not_lead_reference_logprobs_elsewhere(linked: str, corpus: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    writer = SidecarWriter(Corpus.open(corpus), IDENTITY)
    if linked == "directory":
        victim.mkdir()
        writer.directory.symlink_to(victim)
    else:
        victim.write_text("precious")
        writer.directory.mkdir()
        writer._partial("shard-00000").symlink_to(victim)
    with pytest.raises(DataError, match="is a symbolic link"), writer.lock():
        writer.prepare()
    assert (linked == "directory" and not list(victim.iterdir())) or victim.read_text() == "precious"


def test_two_commands_do_not_write_the_same_reference_logprobs(corpus: Path) -> None:
    writer = SidecarWriter(Corpus.open(corpus), IDENTITY)
    with writer.lock(), pytest.raises(DataError, match="is in use by another job"), writer.lock():
        pass
    assert not list(writer.directory.iterdir())


def test_logprobs_are_not_computed_again_for_want_of_a_manifest(corpus: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Corpus.open(corpus)
    with monkeypatch.context() as patched, pytest.raises(DataError, match=r"No space left on device.*it continues"):
        patched.setattr(module, "write_manifest", full)
        write_sidecar(opened)
    writer = SidecarWriter(opened, IDENTITY)
    with writer.lock():
        writer.prepare()
        writer.open()
        assert all(writer.done(i) for i in range(len(LENGTHS)))
        writer.finish({})
    assert Sidecar(opened, IDENTITY).damage(0, 1) == []


@pytest.mark.slow
@pytest.mark.command
def test_a_full_disk_costs_no_logprobs(tmp_path: Path) -> None:
    """On a small tmpfs in a mount namespace: full at first, then once computing has begun, then not."""
    config = write_config(tmp_path, objective={"name": "iw_sft"}, data={"max_steps": 2})
    assert run_python("-m", "megatron_iwsft", "reference", "--config", config).returncode == 0
    (expected,) = (tmp_path / "corpus").glob("reference-*/shard-00000.bin")
    values = expected.read_bytes()
    shutil.rmtree(expected.parent)
    found = on_small_disk(
        "tests.support.full_disk_reference", config, tmp_path / "corpus", tmp_path / "small", size="2m"
    )
    first, second, third = found["calls"]
    for call in (first, second):
        assert call["status"] == 2 and "Traceback" not in call["output"], call["output"]
        assert "cannot write the reference log-probs" in call["output"], call["output"]
        assert "No space left on device" in call["output"] and "run the same command again" in call["output"]
    assert first["files"] == []
    assert not [name for name in second["files"] if name.startswith((".", "fresh")) or name == "manifest.json"]
    assert third["status"] == 0, third["output"]
    assert found["values"] == values.hex()
