"""Damaged and malicious corpora are refused, and the file is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iwsft.data import checksums
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DataError
from tests.support import tiny
from tests.support.damage import edit_array, edit_json, fifo

LENGTHS = [20, 30, 25, 40]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny.token_corpus(tmp_path_factory.mktemp("good"), LENGTHS).directory


@pytest.fixture
def corpus(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "corpus"))


def relist(corpus: Path) -> None:
    """Give the manifest the checksums of the files as they are now, as an attacker who knows the format would."""
    files = json.loads((corpus / "manifest.json").read_text())["files"]
    sums = {name: hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in files}
    edit_json(corpus / "manifest.json", files=sums)


def edit_meta(corpus: Path, **columns: pa.Array) -> None:
    path = corpus / "shard-00000.meta.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
    relist(corpus)


def tokens(change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    return lambda corpus: edit_array(corpus / "shard-00000.bin", np.uint16, change)


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda corpus: edit_json(corpus / "manifest.json", **changes)


def without(key: str) -> Callable[[Path], None]:
    def attack(corpus: Path) -> None:
        content = json.loads((corpus / "manifest.json").read_text())
        del content[key]
        (corpus / "manifest.json").write_text(json.dumps(content))

    return attack


def shard_outside(corpus: Path) -> None:
    victim = Path(shutil.copytree(corpus, corpus.parent / "victim"))
    edit_json(corpus / "manifest.json", shards=[{"name": f"{victim}/shard-00000"}])


def linked_shard(corpus: Path) -> None:
    (corpus / "shard-00000.bin").rename(corpus.parent / "elsewhere")
    (corpus / "shard-00000.bin").symlink_to(corpus.parent / "elsewhere")


def reversed_index(corpus: Path) -> None:
    """The lengths in reverse order, the offsets too: the sequences overlap."""
    raw = bytearray((corpus / "shard-00000.idx").read_bytes())
    offsets = np.frombuffer(raw, np.int64, len(LENGTHS), 34 + 4 * len(LENGTHS))[::-1].copy()
    raw[34 + 4 * len(LENGTHS) : 34 + 12 * len(LENGTHS)] = offsets.tobytes()
    (corpus / "shard-00000.idx").write_bytes(raw)
    relist(corpus)


def float_index(corpus: Path) -> None:
    raw = bytearray((corpus / "shard-00000.idx").read_bytes())
    raw[17] = 5  # int64
    (corpus / "shard-00000.idx").write_bytes(raw)
    relist(corpus)


def beyond_the_vocabulary(corpus: Path) -> None:
    tokens(lambda values: values.put(25, 60_000))(corpus)
    relist(corpus)


def odd_mask(corpus: Path) -> None:
    edit_array(corpus / "shard-00000.mask.bin", np.uint8, lambda values: values.put(25, 7))
    relist(corpus)


def zeroed_mask(corpus: Path) -> None:
    edit_array(corpus / "shard-00000.mask.bin", np.uint8, lambda values: values.fill(0))
    relist(corpus)


# attack → what opening or checking the corpus says
ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard outside": (shard_outside, r"manifest\.json is damaged: shards\.0\.name: .*is not a plain file name"),
    "file outside": (manifest(files={"../victim": "0" * 64}), r"damaged: files\..*is not a plain file name"),
    "file without checksum": (manifest(files={}), "it has no checksum of shard-00000.bin"),
    "shard twice": (manifest(shards=[{"name": "shard-00000"}] * 2), "it lists a shard twice"),
    "no shards": (without("shards"), "damaged: shards: Field required"),
    "no counts": (without("counts"), "damaged: counts: Field required"),
    "no version": (without("format_version"), "damaged: format_version: Field required"),
    "odd types": (manifest(tokenizer=["a"]), "damaged: tokenizer"),
    "huge count": (
        manifest(counts={"trajectories": 10**400, "tokens": 1, "trained_tokens": 1, "dropped": 0}),
        r"damaged: counts\.trajectories",
    ),
    "date of the prompts": (
        manifest(settings={"template": "tokenizer", "record": {"rendering": {"date": "soon"}}}),
        r"damaged: settings\.record\.rendering\.date",
    ),
    "empty vocabulary": (manifest(tokenizer={"fingerprint": "a", "vocab_size": 0}), r"tokenizer\.vocab_size"),
    "manifest is a list": (lambda c: (c / "manifest.json").write_text("[]"), r"manifest\.json is damaged"),
    "deep manifest": (lambda c: (c / "manifest.json").write_text('{"a":' * 99_999), "is not valid JSON"),
    "manifest is not UTF-8": (lambda c: (c / "manifest.json").write_bytes(b'{"\xff": 1}'), "is not valid JSON"),
    "manifest is a FIFO": (fifo("manifest.json"), "has no manifest.json"),
    "linked shard": (linked_shard, r"shard-00000\.bin is a symbolic link"),
    "shard is a FIFO": (fifo("shard-00000.mask.bin"), r"mask\.bin is a FIFO"),
    "index is a FIFO": (fifo("shard-00000.idx"), r"shard-00000\.idx is a FIFO"),
    "metadata is a FIFO": (fifo("shard-00000.meta.parquet"), r"meta\.parquet is a FIFO"),
    "tokenizer is a FIFO": (fifo("tokenizer/tokenizer.json"), r"tokenizer\.json is not a regular file"),
    "tokens rewritten": (tokens(lambda values: values.fill(5)), r"shard-00000\.bin has changed since the manifest"),
    "reversed index": (reversed_index, r"shard-00000\.idx is damaged: its sequences do not lie end to end"),
    "another dtype": (float_index, r"shard-00000\.idx is damaged: .*(int64|end to end)"),
    "beyond the vocabulary": (beyond_the_vocabulary, r"shard-00000\.bin is damaged: ids go from \d+ to 60000"),
    "odd mask": (odd_mask, r"shard-00000\.mask\.bin is damaged: the mask has the value 7"),
    "zeroed mask": (zeroed_mask, r"shard-00000\.mask\.bin is damaged: it does not have as many trained tokens"),
    "metadata of another type": (
        lambda c: edit_meta(c, score=pa.array(["high"] * len(LENGTHS))),
        r"meta\.parquet is damaged: it does not have the columns",
    ),
    "metadata of other lengths": (
        lambda c: edit_meta(c, num_tokens=pa.array(LENGTHS[::-1], pa.int32())),
        "trajectory 0 differs in length from its metadata",
    ),
    "nothing trained": (
        lambda c: edit_meta(c, num_trained=pa.array([0] * len(LENGTHS), pa.int32())),
        "trajectory 0 has an impossible number of trained tokens",
    ),
    "infinite score": (
        lambda c: edit_meta(c, score=pa.array([float("inf")] * len(LENGTHS), pa.float64())),
        "trajectory 0 has an infinite score",
    ),
    "metadata is not Parquet": (
        lambda c: (c / "shard-00000.meta.parquet").write_bytes(b"PAR1" * 9),
        r"meta\.parquet is damaged",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_corpus_is_refused_by_name(attack: str, corpus: Path) -> None:
    apply, message = ATTACKS[attack]
    apply(corpus)
    try:
        said = "\n".join(Corpus.open(corpus).damage())
    except DataError as error:
        said = str(error)
    assert re.search(message, said), said


@pytest.mark.parametrize("attack", [beyond_the_vocabulary, odd_mask])
def test_wrong_values_are_refused_as_they_are_read(attack: Callable[[Path], None], corpus: Path) -> None:
    attack(corpus)
    with pytest.raises(DataError, match=r"shard-00000\..*is damaged"):
        for i in range(len(LENGTHS)):
            Corpus.open(corpus).tokens(i), Corpus.open(corpus).mask(i)


def test_a_corpus_that_is_truncated_while_in_use_is_named(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    os.truncate(corpus / "shard-00000.bin", 10)
    with pytest.raises(DataError, match=r"shard-00000\.bin became shorter after it was opened"):
        opened.tokens(3)


def test_a_long_check_shows_its_progress(corpus: Path, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(checksums, "_UNSHOWN_S", 0.0)
    opened = Corpus.open(corpus)
    size = checksums.bytes_of(corpus, opened.pieces())
    assert size == sum((corpus / name).stat().st_size for name in opened.manifest["files"])
    for shown in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert opened.damage(show_progress=shown) == []
        assert ("checking corpus: 100%" in terminal.getvalue()) == shown


def test_ranks_share_the_check_and_a_sample_reads_some_of_it(corpus: Path, monkeypatch, tmp_path: Path) -> None:
    """With blocks of 16 bytes, as if the corpus were large."""
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 16)
    records = json.loads((corpus / "manifest.json").read_text())
    large = tiny.token_corpus(tmp_path / "large", LENGTHS * 9)
    assert records.get("blocks") is None
    assert len(large.manifest["blocks"]["shard-00000.bin"]) == -(-2 * sum(LENGTHS * 9) // 16)
    assert large.damage() == []
    with open(large.directory / "shard-00000.bin", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01\x02\x03")
    found = [large.damage(large.pieces(share=k, shares=5)) for k in range(5)]
    changed = [f"{large.directory}/shard-00000.bin has changed since the manifest was written"]
    assert sorted(found) == [[], [], [], [], changed]
    assert large.damage(large.pieces("none")) == []
    sampled = [large.damage(large.pieces("sample", seed=seed)) for seed in range(60)]
    assert changed in sampled and [] in sampled
    with open(large.directory / "shard-00000.idx", "ab") as file:
        file.write(b"more")
    assert f"{large.directory}/shard-00000.idx has changed since the manifest was written" in large.damage()
