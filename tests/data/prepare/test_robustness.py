"""Sharding under kills, full disks and invalid input; job arrays; peak memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare import readers
from megatron_iwsft.data.prepare.accounting import verify
from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
from megatron_iwsft.data.prepare.corpus_writer import PROGRESS, SIGNATURES, CorpusWriter
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.job_array import make_parts, merge_parts
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.locks import LOCK, exclusive
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
@pytest.mark.parametrize("times", [3, pytest.param(8, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("finish", [shard_corpus, merge_parts])
def test_a_run_that_was_killed_while_it_cleaned_up_is_cleaned_up_by_the_next(
    finish: Callable, tmp_path: Path, tokenizer: Path
) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    shard_corpus(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)
    expected = files_of(tmp_path / "out")
    for left in (LOCK, PROGRESS, f"shard-00000{SIGNATURES}"):
        (tmp_path / "out" / left).write_text("{}")
    finish(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)
    assert files_of(tmp_path / "out") == expected


@pytest.mark.command
def test_a_job_array_and_its_merge_give_the_same_corpus(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / f"{k}.jsonl", records(1500, k % 3)) for k in range(5)]
    shard_corpus(inputs, tmp_path / "uninterrupted", settings(tokenizer), show_progress=False)
    output = tmp_path / "array"
    line = command(inputs, output, tokenizer)
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    for task in ("3", "1"):
        environment = os.environ | array | {"SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run([*line, "--array", "--workers", "2"], env=environment, capture_output=True, text=True)
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


@pytest.mark.command
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


@pytest.mark.command
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


@pytest.mark.command
def test_an_output_that_cannot_be_written_is_reported(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        assert "cannot write the corpus" in error_message(command(inputs, output, tokenizer, "--workers", "1"))


@pytest.mark.command
def test_a_missing_tokenizer_is_reported(tmp_path: Path) -> None:
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer")
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(1500, 0))]
    line = command(inputs, tmp_path / "out", tokenizer, "--workers", "1")
    (tokenizer / "tokenizer.json").rename(tmp_path / "away")
    assert "no tokenizer at" in error_message(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.command
def test_of_two_runs_at_once_one_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(3000, 0))]
    line = command(inputs, tmp_path / "out", tokenizer, "--workers", "1")
    runs = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [run.communicate()[1] for run in runs]
    # Or one was done before the other began.
    assert sorted(run.returncode for run in runs) in ([0, 0], [0, 2]), messages
    for run, message in zip(runs, messages, strict=True):
        assert run.returncode == 0 or "is in use by another job" in message.splitlines()[-1]
        assert "Traceback" not in message
    shard_corpus(inputs, tmp_path / "alone", settings(tokenizer), show_progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")
    assert verify(tmp_path / "out") == []


def test_a_run_that_holds_the_output_refuses_another(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out", DataError), pytest.raises(DataError, match="is in use by another job"):
        shard_corpus(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)


def test_a_run_that_kept_nothing_leaves_nothing_in_the_way(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    strict = ShardSettings(str(tokenizer), curation=Curation(keep="false"))
    for _ in range(2):
        with pytest.raises(DataError, match=r"no record was kept \(not a JSON object: 1, not to keep: 49\)"):
            shard_corpus(inputs, tmp_path / "out", strict, show_progress=False)
    shard_corpus(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)
    assert verify(tmp_path / "out") == []


def test_a_run_that_failed_can_be_discarded(tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    """Its input was damaged; once that is repaired, it is another run."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    inputs = [tiny.write_jsonl(tmp_path / f"{k}.jsonl", records(2500, k)) for k in range(2)]
    packed = tmp_path / "1.jsonl.gz"
    packed.write_bytes(gzip.compress(inputs[1].read_bytes())[:-50])
    mixed = [inputs[0], packed]
    with pytest.raises(DataError, match=r"input file .*1\.jsonl\.gz (is damaged|cannot be read)"):
        shard_corpus(mixed, tmp_path / "out", settings(tokenizer), show_progress=False)
    assert list((tmp_path / "out").glob("shard-*.bin"))
    packed.write_bytes(gzip.compress(inputs[1].read_bytes()))
    with pytest.raises(DataError, match=r"was started with other inputs .* add --restart to discard them"):
        shard_corpus(mixed, tmp_path / "out", settings(tokenizer), show_progress=False)
    shard_corpus(mixed, tmp_path / "out", settings(tokenizer), restart=True, show_progress=False)
    shard_corpus(mixed, tmp_path / "alone", settings(tokenizer), show_progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_parts_of_another_run_can_be_discarded(tmp_path: Path, tokenizer: Path) -> None:
    inputs = [tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))]
    other = ShardSettings(str(tokenizer), curation=Curation(max_tokens=99))
    make_parts(inputs, tmp_path / "out", other, task=0, tasks=1, show_progress=False)
    with pytest.raises(DataError, match="Run the tasks again with --restart"):
        make_parts(inputs, tmp_path / "out", settings(tokenizer), task=0, tasks=1, show_progress=False)
    make_parts(inputs, tmp_path / "out", settings(tokenizer), task=0, tasks=1, restart=True, show_progress=False)
    merge_parts(inputs, tmp_path / "out", settings(tokenizer), show_progress=False)
    assert verify(tmp_path / "out") == []


def test_an_input_that_changes_meanwhile_is_reported(tmp_path: Path, tokenizer: Path, monkeypatch) -> None:
    source = tiny.write_jsonl(tmp_path / "0.jsonl", records(50, 0))
    finish = CorpusWriter.finish

    def finish_after_a_change(writer: CorpusWriter) -> None:
        finish(writer)
        with open(source, "a") as file:
            file.write("{}\n")

    monkeypatch.setattr(CorpusWriter, "finish", finish_after_a_change)
    with pytest.raises(DataError, match=r"0\.jsonl was changed while it was read"):
        shard_corpus([source], tmp_path / "out", settings(tokenizer), show_progress=False)


def test_inputs_that_cannot_be_records_are_one_message(tmp_path: Path, tokenizer: Path) -> None:
    """Links in a circle, FIFOs, directories, files that cannot be read, empty files, compressed files under a wrong name."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b"{}"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "columns.jsonl")
    (tmp_path / "text.jsonl.gz").write_bytes(b"{}\n")
    (tmp_path / "text.parquet").write_bytes(b"{}\n")
    expected = {
        "loop": "cannot be read: Too many levels of symbolic links",
        "dangling": "cannot be read: No such file",
        "tree/**/*.jsonl": "is a symbolic link that leads back to a directory above it",
        "tree": "is a directory",
        "fifo": "is a FIFO",
        "empty.jsonl": "the inputs are empty",
        "empty.jsonl.gz": "the inputs are empty",
        "packed.jsonl": "is gzip; give it a name that ends in .jsonl.gz",
        "columns.jsonl": "is Parquet; give it a name that ends in .parquet",
        "text.jsonl.gz": "text.jsonl.gz cannot be read",
        "text.parquet": "text.parquet is damaged",
        "absent*.jsonl": "does not exist",
    }
    inputs = {str(tmp_path / name): said for name, said in expected.items()} | {
        "/proc/self/mem": "cannot be read: Input/output error"
    }
    for path, said in inputs.items():
        with pytest.raises(DataError, match=re.escape(said)):
            shard_corpus([path], tmp_path / "out", settings(tokenizer), show_progress=False)


def peak_memory(line: list[str]) -> tuple[int, int]:
    """Peak MiB of a command's own process and of the largest of its other processes.

    Not from getrusage: its maximum is inherited over fork and exec, and does not see workers that a fork server started.
    """
    command = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = others = 0
    while command.poll() is None:
        with contextlib.suppress(psutil.Error, OSError):  # a process has exited
            own = max(own, high_water_mark(command.pid))
            for child in psutil.Process(command.pid).children(recursive=True):
                others = max(others, high_water_mark(child.pid))
        time.sleep(0.02)
    assert command.returncode == 0
    return own, others


def high_water_mark(process: int) -> int:
    """MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024 if "VmHWM" in status else 0


@pytest.mark.command
def test_a_huge_line_is_dropped_without_parsing_it(tmp_path: Path, tokenizer: Path) -> None:
    """200 MB of JSON on one line, within 64 MiB more than without it."""
    good = list(arithmetic_records(200, ArithmeticSettings(digits=4), 0))
    peaks = []
    for name, pieces in (("small", 0), ("huge", 70)):
        source = tmp_path / f"{name}.jsonl"
        with open(source, "wb") as file:
            file.write(b'{"prompt": "')
            for _ in range(pieces):
                file.write(b"ab " * 1_000_000)
            file.write(b'", "response": "x"}\n')
            file.writelines(json.dumps(r).encode() + b"\n" for r in good)
        peaks.append(peak_memory(command([source], tmp_path / name, tokenizer, "--workers", "1"))[0])
    assert peaks[0] > 50 and peaks[1] - peaks[0] < 64, f"peak MiB: {peaks}"
    dropped = json.loads((tmp_path / "huge" / "dropped.jsonl").read_text().splitlines()[0])
    assert dropped["line"] == 1 and dropped["reason"] == "record too large"
    assert dropped["detail"] == "210,000,031 bytes; the maximum is 16,777,216"
    assert Corpus.open(tmp_path / "huge").manifest["counts"]["trajectories"] > 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer: Path) -> None:
    """Except for deduplication (a few dozen bytes per trajectory) and a few blocks in flight."""
    lines = [json.dumps(r) + "\n" for r in arithmetic_records(6000, ArithmeticSettings(digits=9), 0)]
    peaks = []
    for k, times in enumerate((1, 20)):
        with open(tmp_path / f"{k}.jsonl", "w") as file:
            for copy in range(times):
                file.writelines(
                    line.replace("What is", f"What is {copy}:").replace("Add", f"{copy} Add") for line in lines
                )
        line = command([tmp_path / f"{k}.jsonl"], tmp_path / str(k), tokenizer, "--workers", "2")
        peaks.append(peak_memory([word for word in line if word not in ("--near-duplicates", "0.9")]))
    once, twenty = peaks
    assert min(once) > 50 and max(b - a for a, b in zip(once, twenty, strict=True)) < 64, (
        f"peak MiB of main and workers: {peaks}"
    )
