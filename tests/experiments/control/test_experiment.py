"""The control experiment: a smoke run of the command, resuming, and error messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.experiments.control.config import QUICK, load_experiment
from megatron_iwsft.experiments.control.environment import make_environment
from megatron_iwsft.experiments.control.experiment import run_experiment, run_seed
from megatron_iwsft.objectives.functions import Settings
from tests.support import ROOT

CONFIG = ROOT / "configs" / "control-iwsft.yaml"


def test_the_shipped_config_has_the_authors_settings() -> None:
    methods = load_experiment(CONFIG).methods
    assert methods["SFT"].percentiles == methods["iw-SFT"].percentiles == [90]
    assert methods["SFT(Q)"].percentiles == methods["iw-SFT(Q)"].percentiles == [90, 95, 98]
    for name in ("iw-SFT", "iw-SFT(Q)"):
        objective = methods[name].objective
        settings = objective.settings
        assert (settings.level, settings.temperature, settings.clip, settings.normalize) == (
            *("sequence", 10.0, (0.0, 1000.0)),
            "weights",
        )
        assert (objective.proposal.kind, objective.proposal.decay, objective.proposal.update_every) == ("ema", 0.9, 100)


def test_the_hopper_config_has_the_settings_of_the_authors_code() -> None:
    methods = load_experiment(ROOT / "configs" / "control-hopper.yaml").methods
    assert methods["iw-SFT"].objective == methods["iw-SFT(Q)"].objective
    for name, level, clip in (("iw-SFT", "sequence", (0.0, 1000.0)), ("iw-SFT, w per step", "token", (0.0, 2.0))):
        objective = methods[name].objective
        assert objective.settings == Settings(level, 10.0, clip, "sequence_weights")
        assert (objective.proposal.kind, objective.proposal.decay, objective.proposal.update_every) == ("ema", 0.9, 1)
    assert {methods[name].objective.normalize for name in ("SFT", "SFT(Q)")} == {"sequences"}


@pytest.mark.slow
@pytest.mark.command
def test_the_command_prints_a_table_and_can_be_resumed(tmp_path: Path) -> None:
    command = [sys.executable, "tools/control.py", "--config", str(CONFIG), "--quick", f"run.dir={tmp_path}"]
    done = subprocess.run([*command, "run.workers=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["method", "BC", *load_experiment(CONFIG).methods]
    assert "nan" not in done.stdout

    # Seed 1 alone gives the same numbers as in the run with both seeds.
    quick = load_experiment(CONFIG, [*QUICK, f"run.dir={tmp_path}"])
    stored = run_experiment(quick)
    other = quick.model_copy(update={"run": quick.run.model_copy(update={"dir": str(tmp_path / "other")})})
    (tmp_path / "other").mkdir()
    assert run_seed(other, 1) == stored[1]

    with pytest.raises(
        ConfigError, match=r"was computed with other settings than this config; choose another run\.dir"
    ):
        run_experiment(load_experiment(CONFIG, [*QUICK, f"run.dir={tmp_path}", "tuning.lr=0.5"]))


MISTAKES = [
    ("methods.SFT.percentile=[90]", "methods.SFT.percentile is not a known key. Did you mean percentiles?"),
    ("methods.SFT.percentiles=[101]", "methods.SFT.percentiles.0: input should be less than or equal to 100"),
    ("methods.SFT.objective.clip=[3, 1]", "clip must be [low, high] with low < high"),
    ("methods.SFT.objective.proposal.kind=lagged", "input should be 'current', 'ema' or 'snapshot'"),
    ("learner.stepz=3", "learner.stepz is not a known key. Did you mean steps?"),
    ("run.seeds=[]", "run.seeds: list should have at least 1 item"),
]


@pytest.mark.parametrize("override,message", MISTAKES, ids=[m[0].partition("=")[0] for m in MISTAKES])
def test_config_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(CONFIG, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("HalfCheetah-v99", "no environment 'HalfCheetah-v99'"), ("CartPole-v1", r"has the space Discrete\(2\)")],
)
def test_an_unsuitable_task_is_rejected(name: str, message: str) -> None:
    task = load_experiment(CONFIG).task
    with pytest.raises(ConfigError, match=message):
        make_environment(task.model_copy(update={"name": name}))


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ConfigError, match=r"need the package 'mujoco'.*pip install -e '.\[control\]'"):
        make_environment(load_experiment(CONFIG).task)
