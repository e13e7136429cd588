"""The examples run and print what they claim."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT, run_python, torchrun

pytestmark = [pytest.mark.parallel, pytest.mark.command]


def run(name: str) -> str:
    """Standard output of an example on two processes."""
    done = run_python(*torchrun(2), f"examples/{name}.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_iw_sft_in_a_megatron_loop_learns() -> None:
    lines = (ROOT / "examples" / "iw_sft_in_a_megatron_loop.py").read_text().splitlines()
    assert len(lines) < 60
    found = re.findall(r"loss ([\d.]+), mean weight ([\d.]+)", run("iw_sft_in_a_megatron_loop"))
    losses, weights = zip(*(map(float, pair) for pair in found), strict=True)
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.3
    assert weights[0] == 1.0 and weights[-1] > 1.2


def test_the_operator_under_torchrun_gives_exact_log_probs() -> None:
    (difference,) = re.findall(r"differ by at most (\S+)", run("logprobs_under_torchrun"))
    assert float(difference) < 1e-5
