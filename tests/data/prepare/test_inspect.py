"""Corpus inspection: statistics, samples, verification, conversion back to JSONL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.accounting import verify
from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.inspect import Histogram, Inspection, Packing, runs, write_jsonl
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import sha256_file
from tests.support import ROOT, tiny

TOOL = ROOT / "tools" / "inspect_corpus.py"


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def corpus(request, tmp_path_factory) -> Corpus:
    directory = tmp_path_factory.mktemp(request.param)
    records = list(arithmetic_records(300, ArithmeticSettings(), 0))
    source = tiny.write_jsonl(directory / "sums.jsonl", [*records, {"prompt": "<b>", "response": "</b>"}, records[0]])
    if request.param == "bpe":
        tokenizer, template = tiny.hf_tokenizer(directory / "tokenizer"), None
    else:
        tokenizer, template = tiny.sentencepiece_model(directory / "spm.model"), "plain"
    curation = Curation(min_score=0.3)
    settings = ShardSettings(str(tokenizer), template, RecordFormat(score_fields=("score",)), 5_000, curation)
    shard_corpus([source], directory / "corpus", settings, show_progress=False)
    return Corpus.open(directory / "corpus")


def test_runs_are_the_text_split_by_the_mask(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    for i in range(0, len(corpus), 37):
        found = runs(corpus, i)
        assert "".join(text for text, _ in found) == tokenizer.decode(corpus.tokens(i).tolist())
        assert [trained for _, trained in found][:2] == [False, True]
        assert "The answer is" in found[1][0]


def test_terminal_and_page_show_the_facts_of_the_manifest(corpus: Corpus) -> None:
    inspection = Inspection(corpus, seq_lengths=[512, 60], samples=3, seed=1)
    text = inspection.to_terminal(colour=False)
    page = inspection.to_html()
    counts = corpus.manifest["counts"]
    for shown in (text, page):
        for fact in (
            f"{counts['tokens']:,}",
            "score too low",
            "missing field",
            "duplicate",
            "source sums",
            "real tokens",
        ):
            assert fact in shown
    assert text.count("⟦") == page.count("<mark>") == 3
    assert "\x1b[42" in inspection.to_terminal(colour=True)
    assert "http" not in page and "<script" not in page and "src=" not in page, "the page must be self-contained"
    ids = [s.meta["id"] for s in inspection.samples]
    assert ids == [corpus.meta(["id"])["id"][s.index].as_py() for s in inspection.samples]


def test_text_is_escaped_on_the_page(tmp_path: Path) -> None:
    source = tiny.write_jsonl(tmp_path / "r.jsonl", [{"prompt": "<b>&", "response": "<script>"}])
    settings = ShardSettings(str(tiny.hf_tokenizer(tmp_path / "tokenizer")))
    shard_corpus([source], tmp_path / "corpus", settings, show_progress=False)
    page = Inspection(Corpus.open(tmp_path / "corpus"), seq_lengths=[], samples=1).to_html()
    assert "&lt;script&gt;" in page and "<script>" not in page and "&lt;b&gt;&amp;" in page


def test_histograms_count_every_value() -> None:
    for values in (np.array([5]), np.arange(100), np.array([1.5, 1.5]), np.linspace(0, 1, 33)):
        histogram = Histogram.of("x", values)
        assert histogram is not None
        assert histogram.counts.sum() == len(values)
        assert all(0 <= share <= 1 for _, _, share in histogram.rows())
    assert Histogram.of("x", np.zeros(0)) is None


def test_packing_excludes_trajectories_that_are_too_long() -> None:
    packing = Packing.of(np.array([5, 5, 9, 30]), 10)
    assert (packing.sequences, packing.efficiency, packing.too_long) == (2, 19 / 20, 1)


def test_corpus_to_jsonl_and_back_is_identical(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "back.jsonl"
    assert write_jsonl(corpus, path) == len(corpus)
    first = json.loads(path.read_text().splitlines()[0])
    assert first["text"] == corpus.tokenizer().decode(corpus.tokens(0).tolist())
    again = ShardSettings(
        str(corpus.directory / "tokenizer"), record=RecordFormat(score_fields=("score",)), shard_tokens=5_000
    )
    shard_corpus([path], tmp_path / "again", again, show_progress=False)
    second = Corpus.open(tmp_path / "again")
    assert second.shards == corpus.shards
    for shard in corpus.shards:
        for suffix in (".bin", ".idx", ".mask.bin"):
            assert (corpus.directory / f"{shard}{suffix}").read_bytes() == (
                second.directory / f"{shard}{suffix}"
            ).read_bytes()
    assert np.array_equal(second.scores, corpus.scores)
    with pytest.raises(DataError, match="already exists"):
        write_jsonl(corpus, path)


@pytest.mark.command
def test_the_command_verifies_file_hashes(corpus: Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus.directory, copy)
    command = [sys.executable, str(TOOL), str(copy), "--verify", "--trajectories", "1", "--seq-length", "256"]
    command += ["--html", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "every file matches the manifest" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    with open(copy / "shard-00001.mask.bin", "r+b") as file:
        file.write(b"\x07")
    (copy / "shard-00000.idx").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "shard-00001.mask.bin has changed" in done.stderr and "shard-00000.idx is missing" in done.stderr


@pytest.mark.command
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [((), 141, b""), (("--verify", "--seq-length", "0"), 2, b"above 0")],
)
@pytest.mark.parametrize("environment", [{"PYTHONUNBUFFERED": "1"}, {"PYTHONUNBUFFERED": ""}])
def test_the_command_exits_quietly_when_its_output_is_closed(
    corpus: Corpus, arguments: tuple[str, ...], status: int, message: bytes, environment: dict[str, str]
) -> None:
    with subprocess.Popen(
        [sys.executable, str(TOOL), str(corpus.directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        errors = run.stderr.read()
        assert (run.wait(), b"Traceback" in errors) == (status, False)
        assert message in errors if message else errors == b""


def _rewritten(corpus: Corpus, copy: Path, change: Callable[[list[dict]], list[dict]]) -> list[str]:
    """What verification says of a copy whose dropped.jsonl was changed, and its checksum in the manifest too."""
    shutil.copytree(corpus.directory, copy)
    entries = [json.loads(line) for line in (copy / "dropped.jsonl").read_text().splitlines()]
    tiny.write_jsonl(copy / "dropped.jsonl", change(entries))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["dropped.jsonl"] = sha256_file(copy / "dropped.jsonl")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return [complaint.removeprefix(f"{copy}/dropped.jsonl ") for complaint in verify(copy)]


def test_a_dropped_file_that_does_not_add_up_is_found(corpus: Corpus, tmp_path: Path) -> None:
    records = corpus.manifest["inputs"][0]["records"]
    kept = corpus.meta(["file", "line", "id"]).slice(7, 1).to_pylist()[0]
    dropped = corpus.manifest["counts"]["dropped"]
    assert records == len(corpus) + dropped == 302

    def said(change: Callable[[list[dict]], list[dict]]) -> list[str]:
        return _rewritten(corpus, tmp_path / str(len(list(tmp_path.iterdir()))), change)

    def add(*more: dict) -> list[str]:
        return said(lambda entries: [*entries, *more])

    assert said(lambda entries: entries) == []
    reason = json.loads((corpus.directory / "dropped.jsonl").read_text().splitlines()[0])["reason"]
    counted = corpus.manifest["dropped"][reason]
    assert said(lambda entries: entries[1:]) == [
        f"has {dropped - 1} entries; the manifest counts {dropped}",
        f"has {counted - 1} entries with the reason '{reason}'; the manifest counts {counted}",
        "does not add up: of 302 records in sums.jsonl, 301 are kept or dropped",
    ]
    assert said(lambda entries: entries * 2)[0] == f"has {2 * dropped} entries; the manifest counts {dropped}"
    # The counts fit, but one entry stands for another.
    (twice, missing) = said(lambda e: [x for x in e if x["reason"] != reason] + [e[0]] * counted)
    assert twice.endswith(" twice") and missing.startswith("does not add up")
    (both, missing) = said(lambda e: [{**e[0], **kept}, *e[1:]])
    assert both == f"lists line {kept['line']} of sums.jsonl, which was kept" and missing.startswith("does not add up")
    assert "lists records of other.jsonl, which is no input of this corpus" in said(
        lambda e: [{**e[0], "file": "other.jsonl"}, *e[1:]]
    )
    assert add({"file": "sums.jsonl"})[0] == f"is damaged: line {dropped + 1} is not an entry"


def test_a_changed_dropped_file_is_found_by_its_checksum_too(corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(corpus.directory, tmp_path / "copy")
    with open(tmp_path / "copy" / "dropped.jsonl", "a") as file:
        file.write('{"file": "sums.jsonl", "line": 1, "id": "x", "reason": "r"}\n')
    complaints = verify(tmp_path / "copy")
    assert complaints[0].endswith("dropped.jsonl has changed since the manifest was written")
    assert any("entries; the manifest counts" in complaint for complaint in complaints)
