"""`iwsft doctor --config`: what is compared with the machine, and the exit status for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import DataError
from megatron_iwsft.train.fit import Machine, attained_tflops, fit
from megatron_iwsft.train.plan import plan
from tests.support import run_python
from tests.support.small_runs import small_run

SMALL = Machine(gpus=0, memory=10**12)


@pytest.fixture
def run(tmp_path: Path) -> Config:
    return small_run(tmp_path, "run")


def test_memory_is_that_of_the_plan_and_compared_with_what_there_is(run: Config) -> None:
    estimate = plan("train", run, world_size=2).memory
    assert estimate is not None
    enough, little = (fit(run, SMALL, world_size=2, memory=estimate.total * f / 1e9) for f in (1.01, 0.99))
    assert enough.missing == [] and "99%" in dict(enough.lines)["fits"]
    assert len(little.missing) == 1 and "iwsft layouts" in little.missing[0]
    assert fit(run, Machine(gpus=8, memory=estimate.total - 1), world_size=2).missing
    # The processes of a machine without GPUs share its memory.
    assert not fit(run, Machine(gpus=0, memory=2 * estimate.total), world_size=2).missing
    assert fit(run, Machine(gpus=0, memory=2 * estimate.total - 2), world_size=2).missing


def test_time_is_the_plans_flops_at_the_stated_rate(run: Config) -> None:
    found = fit(run, SMALL, world_size=2, tflops=1e-8)
    assert found.flops is not None
    hours = found.flops / 1e4 / 3600
    assert (
        dict(found.lines)["time"]
        == f"{hours:.3g} h at 1e-08 TFLOP/s per process, {2 * hours:,.3g} process hours in all"
    )
    assert dict(fit(run, SMALL, world_size=2).lines)["time"].startswith("not estimated")


def test_a_rate_is_taken_from_an_earlier_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        attained_tflops(tmp_path)
    rows = [{"step": i, "tflops_per_gpu": value} for i, value in enumerate((1.0, 9.0, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert attained_tflops(tmp_path) == 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="--tflops"):
        attained_tflops(tmp_path)


@pytest.mark.slow
@pytest.mark.command
def test_the_exit_status_says_whether_it_fits(run: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    doctor = ("-m", "megatron_iwsft", "doctor", "--config", path, "--gpus", "1")
    done = run_python(*doctor, "--tflops", "1")
    assert done.returncode == 0 and "fits" in done.stdout and "time" in done.stdout, done.stdout + done.stderr
    done = run_python(*doctor, "--memory", "0.000001", "data.corpus=/nowhere")
    assert done.returncode == 2 and "missing" in done.stdout and "/nowhere" in done.stdout, done.stdout + done.stderr
