"""The command in its smoke setting, its resumption, and the mistakes that it names."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.experiments.control.config import QUICK, load_experiment
from megatron_iwsft.experiments.control.environment import make_environment
from megatron_iwsft.experiments.control.experiment import interval, run_experiment, run_seed
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


def test_the_command_prints_a_table_and_continues_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "tools/control.py", "--config", str(CONFIG), "--quick", f"run.dir={tmp_path}"]
    done = subprocess.run([*command, "run.workers=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["method", "BC", *load_experiment(CONFIG).methods]
    assert "nan" not in done.stdout

    # Seed 1 alone, from nothing, gives the numbers it gave beside seed 0.
    quick = load_experiment(CONFIG, [*QUICK, f"run.dir={tmp_path}"])
    stored = run_experiment(quick)
    other = quick.model_copy(update={"run": quick.run.model_copy(update={"dir": str(tmp_path / "other")})})
    (tmp_path / "other").mkdir()
    assert run_seed(other, 1) == stored[1]

    with pytest.raises(ConfigError, match=r"is of other settings than this config; choose another run\.dir"):
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
def test_a_mistake_in_the_config_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(CONFIG, [override])
    assert message in str(error.value)


def test_tasks_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_experiment(CONFIG).task
    with pytest.raises(ConfigError, match="no environment 'HalfCheetah-v99'"):
        make_environment(task.model_copy(update={"name": "HalfCheetah-v99"}))
    with pytest.raises(ConfigError, match=r"has the space Discrete\(2\)"):
        make_environment(task.model_copy(update={"name": "CartPole-v1"}))
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ConfigError, match=r"need the package 'mujoco'.*megatron-iwsft\[control\]"):
        make_environment(task)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert math.isnan(interval([1.0])[1])
