"""The quick start: iw-SFT repairs what SFT does not, and a second call repeats nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment

pytestmark = [pytest.mark.slow, pytest.mark.parallel, pytest.mark.command]


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


def test_it_shows_what_weights_do(tmp_path: Path) -> None:
    output = tmp_path / "quick start"
    said = quickstart(output)
    summary = json.loads((output / "evaluation" / "held-out" / "summary.json").read_text())
    base, sft, iw_sft = (model["pass@1"]["mean"] for model in summary["models"].values())
    assert base < 0.45 and iw_sft >= sft + 0.3
    table = said[said.index("Result") :]
    assert f"{100 * iw_sft:.1f} %" in table and "What is 2 × 17384?" in table and "report.html" in table
    page = (output / "report.html").read_text()
    assert "This is not noise" in page and "Trajectories with the largest" in page
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = quickstart(output)
    assert again[again.index("Result") :] == table
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == written
