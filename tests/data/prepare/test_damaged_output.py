"""Sharding over what an interrupted, attacked or concurrent run has left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.corpus_writer import PROGRESS
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.locks import exclusive
from tests.support import tiny
from tests.support.damage import edit_json


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
    with exclusive(tmp_path / "out", DataError), pytest.raises(DataError, match="is in use by another job"):
        shard(tmp_path, tokenizer)
    assert Corpus.open(shard(tmp_path, tokenizer)).damage() == []
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_failed_write_leaves_no_unfinished_files(tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    from megatron_iwsft.data.prepare import corpus_writer

    def full(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="No space left on device"):
        patched.setattr(corpus_writer.ShardWriter, "close", full)
        shard(tmp_path, tokenizer)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [PROGRESS, "dropped.jsonl"]
    assert Corpus.open(shard(tmp_path, tokenizer)).damage() == []
