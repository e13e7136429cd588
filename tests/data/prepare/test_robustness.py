"""Sharding under kills, full disks and invalid input; job arrays; peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.job_array import make_parts, merge_parts
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from tests.support import ROOT, tiny

TOOL = ROOT / "tools" / "shard_corpus.py"
CURATION = Curation(min_score=0.05, near_duplicates=0.9, max_per_source=4500)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.hf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def records(count: int, seed: int) -> list:
    """Arithmetic records, some of them duplicated, some invalid."""
    out: list = list(arithmetic_records(count, ArithmeticSettings(digits=4), seed))
    for i in range(0, count, 50):
        out[i] = out[i // 2] if i % 100 else "damaged"
    return out


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def command(inputs: list[Path], output: Path, tokenizer: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(TOOL), *map(str, inputs), "--output", str(output), "--tokenizer", str(tokenizer), "--score-field", "score",
        "--min-score", "0.05", "--near-duplicates", "0.9", "--max-per-source", "4500", "--shard-tokens", "60000", *more,
    ]  # fmt: skip


def settings(tokenizer: Path) -> ShardSettings:
    return ShardSettings(str(tokenizer), None, RecordFormat(score_fields=("score",)), 60_000, CURATION)


@pytest.mark.command
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_repeatedly_gives_the_same_corpus(times: int, tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / f"{k}.jsonl", records(5000, k)) for k in range(2)]
    shard_corpus(inputs, tmp_path / "uninterrupted", settings(tokenizer), show_progress=False)
    expected = files_of(tmp_path / "uninterrupted")
    assert sum(name.endswith(".meta.parquet") for name in expected) > 5
    rng = random.Random(0)
    line = command(inputs, tmp_path / "killed", tokenizer, "--workers", "2")
    kills, longest = 0, 1.0
    while kills < times:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.3, longest))
        if process.poll() is None:
            process.kill()  # its workers exit on their own
            kills += 1
            with contextlib.suppress(DataError):
                assert not Corpus.open(tmp_path / "killed").damage()  # a corpus that opens must be complete
        else:
            assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
            longest = time.monotonic() - started
            assert files_of(tmp_path / "killed") == expected
            for path in sorted((tmp_path / "killed").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        process.communicate()
        longest *= 1.15
    subprocess.run(line, check=True, capture_output=True)
    assert files_of(tmp_path / "killed") == expected


def test_a_job_array_and_its_merge_give_the_same_corpus(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / f"{k}.jsonl", records(1500, k % 3)) for k in range(5)]
    shard_corpus(inputs, tmp_path / "uninterrupted", settings(tokenizer), show_progress=False)
    output = tmp_path / "array"
    line = command(inputs, output, tokenizer)
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    for task in ("3", "1"):
        environment = os.environ | array | {"SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run([*line, "--array", "--workers", "1"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with pytest.raises(DataError, match=r"2 of 5 parts in .* are missing or unfinished: 1 \(1.jsonl\), 4 \(4.jsonl\)"):
        merge_parts(inputs, output, settings(tokenizer), show_progress=False)
    with pytest.raises(DataError, match="sharding was interrupted"):
        Corpus.open(output)
    make_parts(inputs, output, settings(tokenizer), task=1, tasks=3, show_progress=False)
    done = subprocess.run([*line, "--merge"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == files_of(tmp_path / "uninterrupted")


def test_parts_of_another_run_and_damaged_parts_are_rejected(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    make_parts(inputs, tmp_path / "out", settings(tokenizer), task=0, tasks=1, show_progress=False)
    other = ShardSettings(str(tokenizer), curation=Curation(max_tokens=99))
    with pytest.raises(DataError, match="was created from other inputs or settings"):
        merge_parts(inputs, tmp_path / "out", other, show_progress=False)
    with pytest.raises(DataError, match=r"tasks are numbered 0 … 1"):
        make_parts(inputs, tmp_path / "out", other, task=2, tasks=2, show_progress=False)
    (piece,) = (tmp_path / "out").rglob("*.arrow")
    piece.write_bytes(piece.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(DataError, match="is damaged"):
        merge_parts(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)


def error_message(line: list[str], **options) -> str:
    """The standard error of a command that must fail with status 2 and without a traceback."""
    done = subprocess.run(line, capture_output=True, text=True, **options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_min_score_without_scores_is_reported(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(3, 0))]
    line = [
        sys.executable,
        str(TOOL),
        *map(str, inputs),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer),
    ]
    assert "--min-score needs scores" in error_message([*line, "--min-score", "1"])


def test_a_full_disk_is_reported_and_the_run_can_be_continued(tmp_path: Path, tokenizer: Path) -> None:
    """A real failing write, caused by a limit on the file size."""
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(3000, 0))]
    line = command(inputs, tmp_path / "out", tokenizer, "--workers", "1")

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))

    message = error_message(line, preexec_fn=no_space)
    assert "cannot write the corpus" in message
    assert "run the same command to continue" in message
    with pytest.raises(DataError, match="sharding was interrupted"):
        Corpus.open(tmp_path / "out")
    subprocess.run(line, check=True, capture_output=True)
    shard_corpus(inputs, tmp_path / "uninterrupted", settings(tokenizer), show_progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


def test_an_output_that_cannot_be_written_is_reported(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        assert "cannot write the corpus" in error_message(command(inputs, output, tokenizer, "--workers", "1"))


def test_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer")
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(1500, 0))]
    line = command(inputs, tmp_path / "out", tokenizer, "--workers", "1")
    (tokenizer / "tokenizer.json").rename(tmp_path / "away")
    assert "no tokenizer at" in error_message(line)
    assert not (tmp_path / "out").exists()


def test_mutated_records_are_kept_or_listed_as_dropped(tmp_path: Path, tokenizer: Path) -> None:
    """2,000 mutated records: each is either in the corpus or in dropped.jsonl, and no text becomes a special token."""
    rng = random.Random(0)
    lines = [mutated(rng, i) for i in range(2000)]
    (tmp_path / "0.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path / "0.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer),
         "--score-field", "score", "--workers", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    corpus = Corpus.open(tmp_path / "out")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text("utf-8").splitlines()]
    kept = corpus.meta(["line"])["line"].to_pylist()
    written = [n for n, line in enumerate(lines, 1) if line.strip()]
    assert sorted(kept + [d["line"] for d in dropped]) == written
    assert len(kept) > 500
    assert len({d["reason"] for d in dropped}) > 12
    counts = corpus.manifest["counts"]
    assert counts["trajectories"] + counts["dropped"] == len(written)
    tokenizer_ = corpus.tokenizer()
    for i in range(len(corpus)):
        turns = corpus.tokens(i).tolist()
        special = [t for t in turns if t in set(tokenizer_.control_ids)]
        begin, end = (
            next(k for k in tokenizer_.control_ids if tokenizer_.decode([k]) == t)
            for t in ("<|im_start|>", "<|im_end|>")
        )
        assert special == [begin, end] * (len(special) // 2), "special tokens must come from the template only"


ODD = [
    *(None, 3, -1.5, [], {}, "", "  ", True, [[1]], {"role": 1}),
    *("\ud83d", "x" * 200_000, 10**400, float("nan"), [None]),
    *("<|im_end|>", "a<|im_start|>assistant\nb", "<|endof", "text|>", "\x00\x01", "\u202e\ufeff"),
    *(["<|im_end|>"], [{"type": "text", "text": "p"}]),
]
ODD_LINES = [
    *(b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"\x00" * 9),
    *(b"[" * 5000, b'{"a":' * 2000, b'{"messages": null}'),
]


def mutated(rng: random.Random, i: int) -> bytes:
    """One line: a valid record, or a mutated one."""
    pair = {"id": i, "prompt": f"What is {i}?", "response": f"It is {i}.", "score": rng.random()}
    chat = {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}], "score": 1}
    tokens = {"input_ids": [5, 6, 7 + i % 90], "loss_mask": [0, 0, 1], "score": True}
    record = rng.choices([pair, chat, tokens], [6, 5, 1])[0]
    text = json.dumps(record)
    kind = rng.randrange(8)
    if kind == 0:
        return text[: rng.randrange(len(text))].encode()
    if kind == 1:
        raw = bytearray(text.encode())
        raw[rng.randrange(len(raw))] = rng.randrange(11, 256)
        return bytes(raw).replace(b"\n", b" ")
    if kind in (2, 3):
        record = json.loads(text)
        record[rng.choice(sorted(record))] = rng.choice(ODD)
        return json.dumps(record).encode()
    if kind == 4:
        record = json.loads(text)
        if "messages" in record:
            rng.choice(record["messages"])[rng.choice(["role", "content", "reasoning", "tool_calls", "name"])] = (
                rng.choice(ODD)
            )
        else:
            del record[rng.choice(sorted(record))]
        return json.dumps(record).encode()
    if kind == 5:
        return rng.choice(ODD_LINES)
    return text.encode()


MEASURE = """
import resource, sys
from pathlib import Path
sys.argv = sys.argv[1:]
import runpy
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    Path(sys.argv[2 + sys.argv[1:].index("--output")] + ".peaks").write_text(" ".join(map(str, peaks)))
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer: Path) -> None:
    """Except for deduplication (23 to 46 bytes per trajectory) and a few blocks in flight."""
    lines = [json.dumps(r) + "\n" for r in arithmetic_records(6000, ArithmeticSettings(digits=9), 0)]
    peaks = []
    for k, times in enumerate((1, 20)):
        with open(tmp_path / f"{k}.jsonl", "w") as file:
            for copy in range(times):
                file.writelines(
                    line.replace("What is", f"What is {copy}:").replace("Add", f"{copy} Add") for line in lines
                )
        arguments = command([tmp_path / f"{k}.jsonl"], tmp_path / str(k), tokenizer, "--workers", "2")[1:]
        line = [sys.executable, "-c", MEASURE, *arguments]
        line = [word for word in line if word not in ("--near-duplicates", "0.9")]
        subprocess.run(line, check=True, capture_output=True)
        peaks.append([int(n) for n in (tmp_path / f"{k}.peaks").read_text().split()])
    once, twenty = peaks
    assert max(b - a for a, b in zip(once, twenty, strict=True)) < 64, f"peak MiB of main and workers: {peaks}"
