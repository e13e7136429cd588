"""`iwsft doctor --gpu` on a CPU: what can run does, what needs a GPU says so, and a failure costs only its own check."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from megatron_iwsft.train import machine_checks
from tests.support import run_python

pytestmark = [pytest.mark.parallel, pytest.mark.command]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_doctor_runs_every_check() -> None:
    done = run_python("tools/doctor.py", "--gpu", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.partition("Checks on this machine\n")[2].splitlines()
    status = {name: next(line for line in lines if line[2:].startswith(f"{name} ")) for name in machine_checks.CHECKS}
    assert len(lines) == len(status)
    run_here = {"matmul in bf16", "attention, local", "collectives", "training step, local"}
    for name, line in status.items():
        assert (" ok " if name in run_here else " skipped ") in line, line
    assert "tp (2)" in status["collectives"] and "nll" in status["training step, local"]
    assert "needs a GPU (Blackwell)" in status["matmul in FP8 mxfp8"]


def raises(platform) -> str:
    raise ValueError("wrong")


def dies(platform) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def hangs(platform) -> str:
    time.sleep(600)
    return "never"


FAILING = {"raises": raises, "dies": dies, "hangs": hangs, "works": lambda platform: "fine"}


@pytest.mark.slow
def test_a_check_that_raises_dies_or_hangs_fails_alone() -> None:
    found = list(machine_checks.run_checks("tests.train.test_machine_checks:FAILING", limit_s=5))
    assert [(outcome.name, outcome.status) for outcome in found] == [
        ("raises", "failed"), ("dies", "failed"), ("hangs", "failed"), ("works", "ok"),
    ]  # fmt: skip
    assert "ValueError: wrong" in found[0].detail
    assert f"status {-signal.SIGKILL}" in found[1].detail
    assert "more than 5 s" in found[2].detail
    assert found[1].seconds > 0 and found[2].seconds >= 5
