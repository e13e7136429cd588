"""Damaged sidecars of reference log-probs are refused, and links in them are not followed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.reference.sidecar import ReferenceIdentity, Sidecar, SidecarWriter
from tests.support import tiny
from tests.support.damage import edit_array, edit_json

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
