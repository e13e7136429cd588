"""Attacks on the files that a run appends to: damage, removal, replacement, links, full disks. No traceback, nothing lost."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.errors import DataError
from megatron_iwsft.report.page import write_report
from megatron_iwsft.report.run_record import read_metrics
from megatron_iwsft.testing import comparable_metrics
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.metrics_file import MetricsFile
from megatron_iwsft.train.callbacks.trackers import wandb_logger
from megatron_iwsft.utils.jsonl import JsonLines
from megatron_iwsft.utils.text import tell

CONFIG = "{run: {name: r, dir: d}, model: {hf: m}, data: {corpus: c, seq_length: 8, epochs: 1}}"


def result(step: int, **metrics) -> StepResult:
    config = parse_config(CONFIG, [], where="test")
    return StepResult(step, 500, {"step": step, "loss": 1.0 / step, **metrics}, stopping=False, config=config)


def steps(path: Path) -> list[int]:
    """Every line of the file must be valid."""
    return [json.loads(line)["step"] for line in path.read_bytes().decode().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 6):
        metrics(result(step))
    return tmp_path / "metrics.jsonl"


def line(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 1.0 / step}).encode() + b"\n"


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "zeros at the end": (lambda c: c + bytes(5000), 5, "line 6 is not valid JSON"),
    "zeros at the start": (lambda c: bytes(5000) + c, 0, "line 1 is not valid JSON"),
    "only zeros": (lambda c: bytes(5000), 0, "line 1 is not valid JSON"),
    "zeros in the middle": (lambda c: line(1) + line(2) + bytes(300) + b"\n" + line(4), 2, "line 3 is not valid JSON"),
    "not UTF-8": (lambda c: c + b'{"step": 6, "a": "\xff\xfe"}\n', 5, "line 6 is not UTF-8 text"),
    "UTF-16": (lambda c: c.decode().encode("utf-16"), 0, "line 1 is not UTF-8 text"),
    "cut off": (lambda c: c[:-10], 4, "line 5 is cut off"),
    "a list": (lambda c: c + b"[1, 2]\n", 5, "line 6 is not a JSON object"),
    "a number": (lambda c: c + b"17\n", 5, "line 6 is not a JSON object"),
    "no step": (lambda c: c + b'{"loss": 1.0}\n', 5, "line 6 does not have the expected fields"),
    "a step of another type": (lambda c: c + b'{"step": "7"}\n', 5, "line 6 does not have the expected fields"),
    "a huge step": (lambda c: c + b'{"step": 1' + b"0" * 400 + b"}\n", 5, "line 6 does not have the expected fields"),
    "an endless number": (lambda c: c + b'{"step": 1' + b"0" * 9000 + b"}\n", 5, "line 6 is not valid JSON"),
    "deep nesting": (lambda c: c + b'{"step":' + b"[" * 200_000 + b"\n", 5, "line 6 is not valid JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_log_keeps_its_valid_lines(kind: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, kept, why = DAMAGE[kind]
    damaged = change(path.read_bytes())
    path.write_bytes(damaged)

    # Readers change nothing.
    if kept:
        assert [row["step"] for row in read_metrics(path.parent)] == list(range(1, kept + 1))
        assert why in capsys.readouterr().err
    else:
        with pytest.raises(DataError, match=f"metrics.jsonl is damaged: {why}"):
            read_metrics(path.parent)
    assert path.read_bytes() == damaged

    # A restart repairs.
    said: list[str] = []
    metrics = MetricsFile(path, 5, said.append)
    metrics(result(6))
    assert steps(path) == [*range(1, kept + 1), 6]
    assert path.with_name("metrics.jsonl.damaged-1").read_bytes() == damaged
    assert len(said) == 1 and why in said[0] and "metrics.jsonl.damaged-1" in said[0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl", "metrics.jsonl.damaged-1"]


def test_a_second_damage_overwrites_no_earlier_copy(path: Path) -> None:
    for number in (1, 2, 3):
        path.write_bytes(path.read_bytes() + b"garbage %d" % number)
        MetricsFile(path, 5)
        assert path.with_name(f"metrics.jsonl.damaged-{number}").read_bytes().endswith(b"garbage %d" % number)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_what_is_not_damage(path: Path) -> None:
    """A last line without line break, blank lines, and Windows line breaks."""
    content = path.read_bytes()
    for harmless in (content[:-1], content + b"\n\n", content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\n\n")):
        path.write_bytes(harmless)
        MetricsFile(path, 5)(result(6))
        assert [row["step"] for row in read_metrics(path.parent)] == [1, 2, 3, 4, 5, 6]
        assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("where", ["metrics", "events"])
@pytest.mark.parametrize("how", ["removed", "emptied", "replaced", "garbage"])
def test_a_log_that_is_changed_while_it_is_written(where: str, how: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "log.jsonl"
    if where == "metrics":
        metrics = MetricsFile(path, 0)
        write = lambda step: metrics(result(step))  # noqa: E731
    else:
        events = Events(path)
        write = lambda step: events("e", "text", step=step)  # noqa: E731
    for step in (1, 2, 3):
        write(step)
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    elif how == "replaced":
        path.unlink()
        path.write_bytes(line(1))
    else:
        path.write_bytes(path.read_bytes() + b"\xff garbage")
    write(4)
    write(5)
    kept = {"removed": [], "emptied": [], "replaced": [1], "garbage": [1, 2, 3]}[how]
    assert steps(path) == [*kept, 4, 5]
    assert b"\0" not in path.read_bytes()
    said = capsys.readouterr().out
    expected = {"removed": "was removed while", "garbage": "is damaged: line 4"}.get(
        how, "was replaced or truncated while"
    )
    assert said.count(expected) == 1


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("what", ["link", "dangling link", "directory", "fifo"])
def test_only_regular_files_are_written(what: str, when: str, tmp_path: Path, capsys) -> None:
    """A link that somebody planted must not lead to another file of the user."""
    victim, path = tmp_path / "victim", tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    victim.write_text("precious\n")
    metrics = MetricsFile(path, 0) if when == "during" else None
    if metrics is not None:
        metrics(result(1))
        path.unlink()
    if what == "link":
        path.symlink_to(victim)
    elif what == "dangling link":
        path.symlink_to(tmp_path / "new")
    elif what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    if metrics is None:
        metrics = MetricsFile(path, 0)
    metrics(result(2))
    assert steps(path) == [2]
    assert victim.read_text() == "precious\n"
    assert not (tmp_path / "new").exists()
    assert os.path.lexists(path.with_name("metrics.jsonl.damaged-1"))
    assert "was not a regular file. It was moved to metrics.jsonl.damaged-1" in capsys.readouterr().out


def test_lines_that_a_full_disk_refuses_are_written_later(path: Path, monkeypatch, capsys) -> None:
    metrics, write, room = MetricsFile(path, 5), os.write, [20]

    def full(file: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(file, content[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", full)
    metrics(result(6))
    metrics(result(7))
    assert steps(path) == [1, 2, 3, 4, 5]
    monkeypatch.setattr(os, "write", write)
    metrics(result(8))
    assert steps(path) == list(range(1, 9))
    assert capsys.readouterr().err.count("No space left on device; its lines are kept in memory") == 1
    assert len(list(path.parent.iterdir())) == 1


def test_a_directory_that_cannot_be_written_does_not_end_the_run(path: Path, monkeypatch, capsys) -> None:
    metrics, events, opened = MetricsFile(path, 5), Events(path.parent / "logs" / "events.jsonl"), os.open

    def refuse(*arguments, **keywords) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    metrics(result(6))
    events("e", "text", step=1)
    monkeypatch.setattr(os, "open", opened)
    metrics(result(7))
    events("e", "text", step=2)
    assert steps(path) == list(range(1, 8))
    assert steps(path.parent / "logs" / "events.jsonl") == [1, 2]


def test_metrics_of_any_type_are_written(path: Path) -> None:
    """Objectives and callbacks of users may return anything."""
    import torch

    odd = {
        "nan": float("nan"),
        "nested": {"x": [float("inf"), 1.5]},
        "numpy": np.float32(0.5),
        "array": np.arange(3),
        "tensor": torch.tensor(2.0),
        "text": "a\udc80b\x1b[31m",
        "object": Path("/x"),
        3: (1, 2),
    }
    MetricsFile(path, 5)(result(6, **{str(k): v for k, v in odd.items()}))
    found = read_metrics(path.parent)[-1]
    assert found["nan"] is None and found["nested"] == {"x": [None, 1.5]} and found["numpy"] == 0.5
    assert found["array"] == [0, 1, 2] and found["tensor"] == 2.0 and found["text"] == odd["text"]
    assert found["object"] == "/x" and found["3"] == [1, 2]


def test_two_writers_do_not_destroy_each_others_lines(tmp_path: Path) -> None:
    one, two = (JsonLines(tmp_path / "a.jsonl", pytest.fail) for _ in range(2))
    for k in range(10):
        (one if k % 3 else two).append({"step": k})
    assert steps(tmp_path / "a.jsonl") == list(range(10))


def test_terminal_sequences_in_events_are_escaped(tmp_path: Path, capsys) -> None:
    events = Events(tmp_path / "events.jsonl")
    events("e", "bad name \x1b]0;owned\x07\x1b[2J\u202e and\na second line")
    assert capsys.readouterr().out == "bad name \\x1b]0;owned\\x07\\x1b[2J\\u202e and\na second line\n"


@pytest.mark.parametrize(
    "content", [b"", b"../../x", b"a b", b"a\n\nb", b"\xff\xfe", bytes(16), b"a" * 65, b"\x1b[31m"]
)
def test_a_damaged_wandb_id_starts_a_new_run(content: bytes, tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    ids: list[str] = []

    class Handle:
        def finish(self) -> None:
            pass

    def init(**settings) -> Handle:
        ids.append(settings["id"])
        return Handle()

    monkeypatch.setattr(wandb, "init", init)
    file, events = tmp_path / "wandb.id", Events(tmp_path / "logs" / "events.jsonl")
    config = parse_config(CONFIG, [f"run.dir={tmp_path}", "logging.wandb.mode=offline"], where="test")
    file.write_bytes(content)
    for _ in range(2):
        with ExitStack() as at_exit:
            wandb_logger(config, events, at_exit)
    assert len(ids) == 2 and ids[0] == ids[1] == file.read_text().strip() and len(ids[0]) == 16
    assert (tmp_path / "wandb.id.damaged-1").read_bytes() == content
    assert "does not hold a wandb run id" in (tmp_path / "logs" / "events.jsonl").read_text()


NAMES = [
    "$x$",
    r"$\frac{",
    "_hidden",
    "a\x1b[31mred",
    "<script>alert(1)</script>",
    "a\nb",
    "x\udc80y",
    "'\"&",
    "%s{0}",
    "列車",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_report_shows_any_name(name: str, tmp_path: Path) -> None:
    run = tmp_path / name.replace("/", "_")
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(line(1) + line(2))
    (run / "config.yaml").write_bytes(b"run: {name: \xff\x1b[31m</pre><script>}\n")
    summary = write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "</pre><script>" not in page and "\x1b" not in page + summary
    assert page.count('class="plot"') == 1


def test_a_report_shows_odd_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    odd = [
        "NaN",
        "Infinity",
        "-1e999",
        "1e308",
        "-1e308",
        '"text"',
        "null",
        "true",
        "[1]",
        "{}",
        "1" + "0" * 400,
        "0",
        "5e-324",
        "2.5",
    ]
    content = "".join(f'{{"step": {k}, "loss": {v}, "nll": {v}, "weight_mean": {v}}}\n' for k, v in enumerate(odd))
    for first, last in ((0, len(odd)), *((k, k + 1) for k in range(len(odd)))):
        lines = content.splitlines(keepends=True)[first:last]
        (run / "metrics.jsonl").write_text("".join(lines))
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "metrics.jsonl").write_text('{"step": 0, "loss": 0, "nll": 1.0, "weight_mean": 1.0}\n')
        write_report([run, other], tmp_path / "report.html")
        write_report([other, run], tmp_path / "report.html")


def test_live_metrics_can_be_compared_while_a_line_is_being_written(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    assert [row["step"] for row in comparable_metrics(path.parent)] == [1, 2, 3, 4, 5]


def test_a_full_disk_under_the_output_ends_neither_a_run_nor_its_threads(tmp_path: Path, monkeypatch) -> None:
    class Output(io.StringIO):
        number = errno.ENOSPC

        def flush(self) -> None:
            raise OSError(self.number, os.strerror(self.number))

    monkeypatch.setattr(sys, "stdout", Output())
    Events(tmp_path / "events.jsonl")("e", "text", step=1)
    assert steps(tmp_path / "events.jsonl") == [1]
    Output.number = errno.EPIPE  # whoever read it has gone
    with pytest.raises(BrokenPipeError):
        tell("text")
    with ThreadPoolExecutor() as thread:
        thread.submit(tell, "text").result()
