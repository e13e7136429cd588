"""Attacks on those who read a corpus: damaged and malicious files are refused by name, and nothing outside the output changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iwsft.data import checksums
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.corpus_writer import PROGRESS
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.reference.sidecar import ReferenceIdentity, Sidecar, SidecarWriter
from megatron_iwsft.utils.locks import exclusive
from tests.support import tiny

IDENTITY = ReferenceIdentity("weights", "tokenizer", "none", "fp32")
LENGTHS = [20, 30, 25, 40]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny.token_corpus(tmp_path_factory.mktemp("good"), LENGTHS).directory


@pytest.fixture
def corpus(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "corpus"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def relist(corpus: Path) -> None:
    """Give the manifest the checksums of the files as they are now, as an attacker who knows the format would."""
    files = json.loads((corpus / "manifest.json").read_text())["files"]
    sums = {name: hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in files}
    edit_json(corpus / "manifest.json", files=sums)


def edit_array(path: Path, dtype: type, change: Callable[[np.ndarray], None]) -> None:
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)


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


def fifo(name: str) -> Callable[[Path], None]:
    def attack(corpus: Path) -> None:
        (corpus / name).unlink()
        os.mkfifo(corpus / name)

    return attack


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
    found = [large.damage(share=k, shares=5) for k in range(5)]
    changed = [f"{large.directory}/shard-00000.bin has changed since the manifest was written"]
    assert sorted(found) == [[], [], [], [], changed]
    assert large.damage("none") == []
    sampled = [large.damage("sample", seed=seed) for seed in range(60)]
    assert changed in sampled and [] in sampled
    with open(large.directory / "shard-00000.idx", "ab") as file:
        file.write(b"more")
    assert f"{large.directory}/shard-00000.idx has changed since the manifest was written" in large.damage()


# Reference log-probs -------------------------------------------------------------------------------------------------------------


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
    with writer.lock(), pytest.raises(DataError, match="is being written by another command"), writer.lock():
        pass
    assert not list(writer.directory.iterdir())


# Sharding ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.hf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shard(tmp_path: Path, tokenizer: Path, **settings: Any) -> Path:
    records = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(9)]
    tiny.write_jsonl(tmp_path / "records.jsonl", records)
    chosen = ShardSettings(str(tokenizer), **settings)
    shard_corpus([tmp_path / "records.jsonl"], tmp_path / "out", chosen, show_progress=False)
    return tmp_path / "out"


def stopped(tmp_path: Path, tokenizer: Path, monkeypatch) -> Path:
    """The output of a run that was stopped after its first shard."""
    from megatron_iwsft.data.corpus import ShardWriter

    close, closed = ShardWriter.close, []

    def stop_after_one(writer: ShardWriter) -> Any:
        if closed:
            raise KeyboardInterrupt
        closed.append(writer)
        return close(writer)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ShardWriter, "close", stop_after_one)
        shard(tmp_path, tokenizer, shard_tokens=60)
    return tmp_path / "out"


def shard_name_outside(output: Path) -> None:
    progress = json.loads((output / PROGRESS).read_text())
    progress["shards"][0]["name"] = "../victim"
    (output / PROGRESS).write_text(json.dumps(progress))


def linked_drops(output: Path) -> None:
    (output / "dropped.jsonl").unlink()
    (output / "dropped.jsonl").symlink_to(output.parent / "victim")


PROGRESS_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not JSON": (lambda d: (d / PROGRESS).write_text("{"), "is not valid JSON"),
    "foreign": (lambda d: (d / PROGRESS).write_text('{"progress": 1}'), r"\.progress\.json is damaged"),
    "odd types": (lambda d: edit_json(d / PROGRESS, shards={"a": 1}), "damaged: shards"),
    "negative": (lambda d: edit_json(d / PROGRESS, dropped_bytes=-5), "damaged: dropped_bytes"),
    "too many inputs": (lambda d: edit_json(d / PROGRESS, source=99), "does not describe a run of 1 input files"),
    "shard outside": (shard_name_outside, "is not a plain file name"),
    "drops cut": (lambda d: edit_json(d / PROGRESS, dropped_bytes=10**6), r"dropped\.jsonl has 0 bytes"),
    "linked drops": (linked_drops, r"dropped\.jsonl is a symbolic link"),
    "a FIFO": (lambda d: os.mkfifo(d / "shard-00001.bin.partial"), r"shard-00001\.bin\.partial is a FIFO"),
    "a shard is missing": (lambda d: (d / "shard-00000.mask.bin").unlink(), r"shard-00000\.mask\.bin is missing"),
}


@pytest.mark.parametrize("attack", PROGRESS_ATTACKS)
def test_a_damaged_unfinished_corpus_is_refused(attack: str, tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    output = stopped(tmp_path, tokenizer, monkeypatch)
    assert not list(output.glob("*.partial")), "an unfinished shard was left behind"
    (tmp_path / "victim").write_text("precious")
    apply, message = PROGRESS_ATTACKS[attack]
    apply(output)
    with pytest.raises(DataError, match=message):
        shard(tmp_path, tokenizer, shard_tokens=60)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("content", ["{", "[]", '{"run": 3}', None])
def test_sharding_over_a_damaged_manifest_is_refused(content: str | None, tmp_path: Path, tokenizer: Path) -> None:
    path = shard(tmp_path, tokenizer) / "manifest.json"
    if content is None:  # the right run, and nothing else
        content = json.dumps({"run": json.loads(path.read_text())["run"]})
    path.write_text(content)
    with pytest.raises(DataError, match="Choose another --output"):
        shard(tmp_path, tokenizer)


def test_two_commands_do_not_write_the_same_corpus(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out", DataError), pytest.raises(DataError, match="is being written by another command"):
        shard(tmp_path, tokenizer)
    assert Corpus.open(shard(tmp_path, tokenizer)).damage() == []
    assert not (tmp_path / "out" / ".lock").exists()
