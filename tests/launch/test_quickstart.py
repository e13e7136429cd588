"""The quick start: iw-SFT repairs what SFT does not, and what was cut off continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment, events


def start(output: Path, python: Path | str = sys.executable) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal would; its output is in OUTPUT.log."""
    with open(output.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            ["bash", "launch/quickstart.sh"],
            cwd=ROOT,
            env=command_environment(IWSFT_PYTHON=str(python), IWSFT_QUICKSTART=str(output)),
            text=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], output: Path) -> tuple[int, str]:
    """(exit status, what it has printed)"""
    return process.wait(), output.with_suffix(".log").read_text()


def stop(output: Path, number: signal.Signals, when: Callable[[], bool]) -> tuple[int, str]:
    """Start it, and send that signal to all of its processes once `when()` holds."""
    process = start(output)
    while not when():
        assert process.poll() is None, finish(process, output)[1]
        time.sleep(0.1)
    os.killpg(process.pid, number)
    return finish(process, output)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.command
@pytest.mark.parametrize(
    ("difference", "p_value", "said"),
    [
        (0.5, 1e-30, "iw-SFT answers more problems right than SFT: +50.0 points [+45.0, +55.0], p < 1e-12"),
        (-0.5, 1e-4, "iw-SFT answers fewer problems right than SFT: -50.0 points [-55.0, -45.0], p = 0.0001"),
        (0.02, 0.4, "iw-SFT and SFT cannot be told apart here: +2.0 points [-3.0, +7.0], p = 0.4"),
    ],
)
def test_the_sentence_follows_what_was_measured(difference: float, p_value: float, said: str, tmp_path: Path) -> None:
    def model(mean: float) -> dict:
        return {"pass@1": {"mean": mean, "low": mean, "high": mean}}

    interval = {"difference": difference, "low": difference - 0.05, "high": difference + 0.05, "p_value": p_value}
    summary = {
        "models": {"a": model(0.5), "b": model(0.1), "c": model(0.5 + difference)},
        "comparisons": [{"from": "a", "to": "b"} | interval, {"from": "a", "to": "c"} | interval],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    command = [sys.executable, "launch/quickstart_result.py", tmp_path / "summary.json"]
    printed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    table, sentence = printed.split("\n\n")
    assert [line.split("  ")[1] for line in table.splitlines()] == ["base model", "SFT", "iw-SFT"]
    assert " ".join(sentence.split()).startswith(said)
    assert ("weighs each answer" in sentence) == ("more problems" in said)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.command
def test_it_shows_what_weights_do(tmp_path: Path) -> None:
    """Also if it is killed while the base model answers, stopped while SFT trains, and run again each time."""
    output = tmp_path / "quick start"
    sampled = output / "sampled" / "practice"
    status, said = stop(output, signal.SIGKILL, lambda: any(lines(path) > 1 for path in sampled.glob("*.jsonl")))
    assert status == -signal.SIGKILL and "3/6" in said and "4/6" not in said
    (answers,) = sampled.glob("*.jsonl")
    kept = answers.read_bytes()[: answers.read_bytes().rindex(b"\n") + 1]
    status, said = stop(output, signal.SIGINT, lambda: lines(output / "sft" / "metrics.jsonl") >= 1)
    assert status == 130 and "Start the run again to continue." in said and "the same command to continue" in said
    assert answers.read_bytes().startswith(kept), "answers are kept"
    trained = {path: path.stat().st_mtime_ns for path in (output / "base").rglob("*.safetensors")}
    assert trained and "3/6" in said and not list((output / "sft").rglob("*.safetensors"))

    status, said = finish(start(output), output)
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in (output / "base").rglob("*.safetensors")} == trained
    assert [event["step"] for event in events(output / "sft", "resumed")] == [
        event["step"] for event in events(output / "sft", "stopped")
    ]
    summary = json.loads((output / "evaluation" / "held-out" / "summary.json").read_text())
    sft, base, iw_sft = (model["pass@1"]["mean"] for model in summary["models"].values())
    assert "more problems right than SFT" in said
    assert base < 0.45 and iw_sft >= sft + 0.3
    table = said[said.index("Result") :]
    assert f"{100 * iw_sft:.1f} %" in table and "What is 2 × 17384?" in table and "report.html" in table
    page = (output / "report.html").read_text()
    assert "This is not noise" in page and "Trajectories with the largest" in page
    for caption in ("gradient norm, before clipping", "peak memory, GB", "share of weights changed by the clip"):
        assert f"<figcaption>{caption}</figcaption>" in page, "of what real runs log"
    assert "where the time of a step goes, iw-sft" in page and "distribution of the weights, iw-sft" in page

    # Run again, it starts only commands that skip what is complete themselves.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/started"\n')
    python.chmod(0o755)
    assert finish(start(output, python), output)[0] == 0
    started = [
        line.split("-m megatron_iwsft ")[1].split()[0]
        for line in (tmp_path / "started").read_text().splitlines()
        if "-m " in line
    ]
    assert started == ["shard", "shard", "evaluate", "report", "generate"]
