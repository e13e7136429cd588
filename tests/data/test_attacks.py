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

from megatron_iwsft.data import checksums, template_engine
from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.corpus_writer import PROGRESS
from megatron_iwsft.data.prepare.expressions import compile_expression
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.inspect import Inspection
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.reference.sidecar import ReferenceIdentity, Sidecar, SidecarWriter
from megatron_iwsft.utils.locks import exclusive
from megatron_iwsft.utils.text import printable
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
    with writer.lock(), pytest.raises(DataError, match="is in use by another job"), writer.lock():
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


# Chat templates, tokenizers and records ------------------------------------------------------------------------------------------

CHATML = PRESETS["chatml"]
HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"

# Evaluated for conversations that contain the word `now`; what the record is dropped with.
IN_TEMPLATE = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 2 ** 99999999999 }}": "OverflowError",
    "{{ 99 ** 64 ** 64 ** 64 }}": "OverflowError",
    "{{ 'a' * 10000000000000 }}": "OverflowError",
    "{{ [0] * 10000000000000 }}": "OverflowError",
    "{{ 'a'.ljust(100000000000) }}": "MemoryError",
    "{{ 'a' | center(100000000000) }}": "MemoryError",
    "{{ '%1000000000000d' % 5 }}": "(MemoryError|ValueError|OverflowError)",
    "{{ 1 | round(1000000000, 'ceil') }}": "OverflowError",
    "{{ 1 | round(-1000000000) }}": "OverflowError",
    "{{ messages[99].role.x }}": "has no element 99",
    "{{ ''.join(5) }}": "TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "MemoryError",
    HANG: "took longer than 0.5 seconds",
}


@pytest.mark.parametrize("attack", IN_TEMPLATE)
def test_a_template_that_fails_drops_the_record(attack: str, tmp_path: Path, monkeypatch) -> None:
    if attack == HANG:
        monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    monkeypatch.setattr(template_engine, "_EXTRA_BYTES", 1 << 28)
    source = f"{{% if 'now' in messages[0].content %}}{attack}{{% endif %}}{CHATML}"
    tiny.write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "Do it now", "response": "x"}, {"prompt": "Do not", "response": "x"}]
    )
    settings = ShardSettings(str(tiny.hf_tokenizer(tmp_path / "t", template=source)))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    (dropped,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert dropped["reason"] == "template cannot render it"
    assert re.search(IN_TEMPLATE[attack], dropped["detail"]), dropped["detail"]


def tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "tokenizer_config.json", **changes)


def template(source: str) -> Callable[[Path], None]:
    return tokenizer_config(chat_template=source)


TOKENIZER_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a template that hangs": (template(HANG + CHATML), "took longer than 0.5 seconds"),
    "a constant power": (template("{{ 9 ** 64 ** 64 ** 64 }}" + CHATML), "OverflowError"),
    "a deep template": (template("{{ " + "(" * 9000 + ")" * 9000 + " }}"), "is not valid Jinja"),
    "many nested loops": (
        template("{% for a in x %}" * 300 + "{% endfor %}" * 300),
        "is not valid Jinja|cannot render",
    ),
    "a template of no type": (tokenizer_config(chat_template={"a": 1}), "damaged: chat_template"),
    "a template of odd entries": (tokenizer_config(chat_template=[3]), "damaged: chat_template"),
    "a token of no type": (tokenizer_config(eos_token=["a"]), "damaged: eos_token"),
    "a list as config": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "is damaged"),
    "a deep config": (lambda d: (d / "tokenizer_config.json").write_text('{"a":' * 99_999), "not valid JSON"),
    "a FIFO as config": (lambda d: os.mkfifo(d / "special_tokens_map.json"), "it is a FIFO, not a file"),
    "a template that is not UTF-8": (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    "a FIFO as template": (lambda d: os.mkfifo(d / "chat_template.jinja"), "it is a FIFO, not a file"),
    "a FIFO as tokenizer": (fifo("tokenizer.json"), "no tokenizer at"),
    "a damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text('{"model": 1}'),
        "cannot be read as a tokenizer",
    ),
    "a tokenizer that is not UTF-8": (
        lambda d: (d / "tokenizer.json").write_bytes(b"\xff"),
        "cannot be read as a tokenizer",
    ),
}


@pytest.mark.parametrize("attack", TOKENIZER_ATTACKS)
def test_a_malicious_tokenizer_is_refused(attack: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    apply, message = TOKENIZER_ATTACKS[attack]
    directory = tiny.hf_tokenizer(tmp_path / "t")
    apply(directory)
    with pytest.raises(DataError, match=message):
        ChatTemplate(load_tokenizer(directory))


EXPRESSIONS = ["'a' * 10000000000000", "'%1000000000d' % judge", "[1] * 99", "((" * 9999, "judge ** 9", "9" * 5000]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda e: e[:20])
def test_expressions_that_could_take_all_memory_are_refused(expression: str) -> None:
    with pytest.raises(DataError, match="is not a valid expression over fields"):
        compile_expression(expression)


@pytest.mark.parametrize("text", ["judge * 99999999999999", "judge % 5", "judge + 5", "number * number"])
def test_arithmetic_on_the_texts_of_a_record_is_refused(text: str) -> None:
    with pytest.raises((TypeError, OverflowError)):
        compile_expression(text)({"judge": "%1000000000d", "number": 10**4000})


DEEP = [
    b'{"prompt": "a", "response": "b", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"prompt": "a", "response": "b", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
    + (b"[" * 1000 + b"]" * 1000)
    + b"}]}",
]


def test_deeply_nested_records_are_dropped(tmp_path: Path, tokenizer: Path) -> None:
    good = b'{"prompt": "a", "response": "b", "x": 3}'
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([good, *DEEP]))
    settings = ShardSettings(str(tokenizer), curation=Curation(keep="str(x) != '5' and x == x"))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    assert len(Corpus.open(tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_inputs_that_are_no_files_are_refused(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    os.mkfifo(tmp_path / "r.jsonl")
    path = tmp_path / "r.jsonl" if kind == "FIFO" else Path("/dev/zero")
    with pytest.raises(DataError, match=f"is a {kind}"):
        shard_corpus([path], tmp_path / "out", ShardSettings(str(tokenizer)), show_progress=False)


def test_text_of_records_cannot_control_the_terminal(tmp_path: Path, tokenizer: Path) -> None:
    escape = "\x1b[2J\x1b]0;owned\x07\u202e\x9b1m"
    record = {"id": f"i{escape}", "prompt": f"p{escape}", "response": f"r{escape}\r", "from": f"s{escape}"}
    tiny.write_jsonl(tmp_path / "r.jsonl", [record])
    from megatron_iwsft.data.prepare.records import RecordFormat

    settings = ShardSettings(str(tokenizer), record=RecordFormat(source_field="from"))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    text = Inspection(Corpus.open(tmp_path / "out"), seq_lengths=[], samples=1).to_terminal(colour=False)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "i\\x1b[2J\\x1b]0;owned\\x07\\u202e\\x9b1m" in text
    assert printable("a\tb\nc é 👨‍👩‍👧 \udc80") == "a\tb\nc é 👨‍👩‍👧 \\udc80"
