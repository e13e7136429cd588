"""The command for the day a GPU is there, dry-run on the CPU with only the packages that a bare GPU machine has."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest

from tests.support import ROOT, command_environment, run_python

pytestmark = [pytest.mark.slow, pytest.mark.parallel, pytest.mark.command]

# What the package imports and such a machine lacks: it has torch, Triton, transformers, and a few packages more.
MISSING = "wandb plotly gigatoken math_verify latex2sympy2_extended antlr4 rensa gymnasium mujoco tensorboard".split()


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a Python in which those packages cannot be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"""
from importlib.machinery import PathFinder

found = PathFinder.find_spec


class Find:  # not a function, which pytest would bind to its import hook
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {MISSING!r} else found(name, path, target)


PathFinder.find_spec = Find()
"""
    )
    environment = command_environment(IWSFT_PYTHON=sys.executable, IWSFT_GPU_DAY_SECONDS="900")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), environment["PYTHONPATH"]])
    return environment


def gpu_day(*arguments, environment) -> subprocess.CompletedProcess[str]:
    command = ["bash", "tools/bench/gpu_day.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


def test_every_part_runs_and_is_reported(bare, tmp_path) -> None:
    done = gpu_day(tmp_path / "out", "--dry-run", environment=bare)
    report = (tmp_path / "out" / "report.md").read_text()
    assert done.returncode == 0, done.stdout + report
    assert "a dry run on the CPU" in report and "torch 2." in report
    for part in ("doctor", "tests", "operator", "train-1.5b-bf16", "train-7b-bf16"):
        assert f"| {part} | ok |" in report, report
    assert "training step, local" in report and "full-logits" in report
    for objective in ("sft", "iw_sft cached", "iw_sft live"):
        line = next(line for line in report.splitlines() if line.startswith("ours") and objective in line)
        assert "failed" not in line and "tokens/s" not in line, line


def test_a_training_case_that_fails_makes_its_part_fail() -> None:
    sizes = "--seq-length 128 --batch 2 --steps 1 --warmup 0 --vocabulary 512 --objective sft --dtype fp32".split()
    done = run_python(
        "tools/bench/train.py", "--no-peer", "--model", "tiny", "--only-fp8", "--fp8", "blockwise", *sizes
    )
    assert done.returncode == 1 and "failed: " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("problem", "status"), [("RuntimeError: wrong", 1), ("ModuleNotFoundError: no module", 0)])
def test_an_implementation_that_fails_makes_its_part_fail(problem: str, status: int, monkeypatch) -> None:
    """One that is not installed does not."""
    bench = runpy.run_path(str(ROOT / "tools" / "bench" / "logprob.py"))
    monkeypatch.setattr("megatron_iwsft.testing.run_distributed", lambda *args, **options: [{"ours": problem}])
    monkeypatch.setattr(sys, "argv", ["logprob.py", "--only", "ours"])
    assert bench["main"]() == status


def test_a_part_that_fails_or_hangs_costs_only_itself(bare, tmp_path) -> None:
    """A Python that fails in the doctor, hangs in the operator bench and answers elsewhere."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$*" in
  *doctor.py*) echo "Traceback: broken" >&2; exit 3 ;;
  *logprob.py*) sleep 600 ;;
  *) echo "ran $*" ;;
esac
"""
    )
    python.chmod(0o755)
    environment = bare | {"IWSFT_PYTHON": str(python), "IWSFT_GPU_DAY_SECONDS": "30"}
    done = gpu_day(tmp_path / "out", "--dry-run", environment=environment)
    report = (tmp_path / "out" / "report.md").read_text()
    assert done.returncode == 1
    assert "| doctor | failed with status 3 |" in report and "Traceback: broken" in report
    assert "| operator | stopped after its limit of" in report
    assert "| tests | left out: no time left |" in report
