"""`iwsft doctor --config`: what is compared with the machine, and the exit status for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.train.fit import Machine, attained_tflops, fit
from megatron_iwsft.train.plan import plan
from megatron_iwsft.utils.memory import group_limit
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
    on_gpus = dict(fit(run, Machine(gpus=2, memory=10**12), world_size=2, tflops=1e-8).lines)["time"]
    assert on_gpus.endswith(f"at 1e-08 TFLOP/s per GPU, {2 * hours:,.3g} GPU hours in all")


def test_a_rate_is_taken_from_an_earlier_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        attained_tflops(tmp_path)
    rows = [{"step": i, "tflops_per_gpu": value} for i, value in enumerate((1.0, 9.0, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert attained_tflops(tmp_path) == 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="--tflops"):
        attained_tflops(tmp_path)


def test_gpus_are_compared_with_the_processes(run: Config) -> None:
    of_two = dict(fit(run, Machine(gpus=8, memory=10**12), world_size=2).lines)
    assert of_two["GPUs"] == "2 of this machine's 8"
    one_each = fit(run, Machine(gpus=1, memory=10**12), world_size=2)
    assert not one_each.missing and dict(one_each.lines)["GPUs"] == "2: 2 machines with 1 each, as here"
    (uneven,) = fit(run, Machine(gpus=3, memory=10**12), world_size=4).missing[-1:]
    assert "this machine has 3, which does not divide 4" in uneven


def test_the_device_is_the_one_that_the_run_would_use(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100 80GB HBM3")
    assert Machine.here("auto") == Machine(2, 80 * 10**9, peak=989.4)
    assert Machine.here("auto").tflops_at(0.5) == pytest.approx(494.7)
    monkeypatch.setenv("IWSFT_DEVICE", "cpu")
    assert Machine.here("auto").gpus == 0 and Machine.here("cuda").gpus == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = fit(run, Machine.here("cuda"), world_size=2)
    assert "fits" not in dict(found.lines) and "torch sees no GPU" in found.missing[0]
    with pytest.raises(ConfigError, match="--tflops"):
        Machine.here("cuda").tflops_at(0.4)


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "8192"}, 4096),
        ("0::/\n", {"memory.max": "max"}, None),
        ("5:cpu:/x\n4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "512", "memory.max": "1"}, 512),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("", {}, None),
    ],
)
def test_limits_of_control_groups_count(own: str, files: dict[str, str], limit: int | None, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert group_limit(tmp_path / "root", tmp_path / "own") == limit


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
