"""The quick start: iw-SFT repairs what SFT does not, and a second call repeats nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment


def quickstart(output: Path) -> str:
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"],
        cwd=ROOT,
        env=command_environment(IWSFT_PYTHON=sys.executable, IWSFT_QUICKSTART=str(output)),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    output = tmp_path / "quick start"
    said = quickstart(output)
    summary = json.loads((output / "evaluation" / "held-out" / "summary.json").read_text())
    sft, base, iw_sft = (model["pass@1"]["mean"] for model in summary["models"].values())
    assert "more problems right than SFT" in said
    assert base < 0.45 and iw_sft >= sft + 0.3
    table = said[said.index("Result") :]
    assert f"{100 * iw_sft:.1f} %" in table and "What is 2 × 17384?" in table and "report.html" in table
    page = (output / "report.html").read_text()
    assert "This is not noise" in page and "Trajectories with the largest" in page
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = quickstart(output)
    assert again[again.index("Result") :] == table
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == written
