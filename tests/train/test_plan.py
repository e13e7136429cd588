"""`--dry-run`: what it prints is what the job then does, and it refuses what the job would refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.cli import main as cli
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.adapters import AdapterSettings, num_parameters
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.train.check import check
from megatron_iwsft.train.plan import _size, plan
from tests.support import run_python, tiny
from tests.support.reported_run import write_reference
from tests.support.small_runs import small_run

MODEL = tiny.model_config(num_hidden_layers=2, hidden_size=32, intermediate_size=48)


@pytest.fixture
def run(tmp_path: Path) -> Config:
    return small_run(tmp_path, "run")


def lines(config: Config, **options) -> dict[str, str]:
    """What → text, of the last line about it."""
    return dict(plan(options.pop("command", "train"), config, world_size=2, **options).lines)


def changed(config: Config, section: str, /, **values) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_the_plan_counts_what_the_run_will_do(run: Config) -> None:
    checked, found = check(run, world_size=2), lines(changed(run, "data", max_steps=None, epochs=3))
    epoch = checked.sampler.epoch(0)
    assert found["steps"] == f"{3 * epoch.num_steps}: 3 epochs of {epoch.num_steps}"
    assert found["tokens"] == f"{3 * int(checked.mixture.lengths.sum()):,}"
    assert found["packing"].startswith(f"20 trajectories in {len(epoch.packs)} sequences per epoch")
    assert found["reference"] == "none is needed"
    assert "DP 2" in found["processes"] and "after the last step" in found["writes"]
    assert not Path(run.run.dir).exists()  # nothing is written


def test_memory_follows_precision_and_copies(run: Config) -> None:
    by_dtype = {}
    for dtype in ("fp32", "bf16"):
        estimate = plan("train", changed(run, "precision", dtype=dtype), world_size=1).memory
        assert estimate is not None
        by_dtype[dtype] = estimate
    assert by_dtype["fp32"].parameters == 2 * by_dtype["bf16"].parameters
    assert 3 * by_dtype["fp32"].optimizer == 2 * by_dtype["bf16"].optimizer  # no master weights
    live = changed(changed(run, "objective", name="iw_sft"), "reference", source="live")
    assert "reference and proposal" in lines(live)["memory"] and "reference and proposal" not in lines(run)["memory"]


def test_memory_and_checkpoints_of_adapters_are_theirs_alone(run: Config) -> None:
    arch = Architecture.from_hf(MODEL, where="test")
    trained = num_parameters(arch, AdapterSettings.of(arch, rank=4, alpha=8.0, targets=None))
    adapted = changed(run, "adapter", rank=4)
    full, own = (plan("train", config, world_size=1).memory for config in (run, adapted))
    assert full is not None and own is not None
    assert own.parameters == full.parameters + 4 * trained, "in fp32, beside the base"
    assert own.gradients == 4 * trained and own.optimizer == 8 * trained, (
        "of adapters, where full training has those of weights"
    )
    assert full.gradients > 10 * own.gradients
    assert f"checkpoints of {_size(12 * trained)} " in lines(adapted)["writes"]
    weighted = changed(adapted, "objective", name="iw_sft")
    assert "reference and proposal" in lines(changed(weighted, "reference", source="live"))["memory"]
    based = lines(changed(weighted, "reference", source="base"))
    assert "reference and proposal" not in based["memory"] and based["reference"] == "base"


def test_a_setting_that_the_installed_megatron_core_lacks_is_refused(run: Config, monkeypatch) -> None:
    monkeypatch.setattr(type(run.megatron), "given", lambda self: {"of_another_version": True})
    with pytest.raises(ConfigError, match=r"megatron.of_another_version is no setting of the installed Megatron-Core"):
        plan("train", run, world_size=2)


def test_a_reference_that_is_missing_is_an_error_or_reported(run: Config) -> None:
    weighted = changed(run, "objective", name="iw_sft")
    write_reference(Corpus.open(run.data.corpus))
    with pytest.raises(
        DataError, match=r"has no log-probs of this reference model .*it has reference-\w+ \(of another model\)\. Model"
    ):
        plan("train", weighted, world_size=2)
    found = plan("train", weighted, world_size=2, allow_missing=True)
    assert [text for text in found.missing if "has no log-probs of this reference" in text]
    assert "would be written" in lines(weighted, command="reference")["writes"]


def test_what_is_not_there_is_an_error_or_reported(run: Config, tmp_path: Path) -> None:
    elsewhere = changed(changed(run, "model", config=None, hf="/nowhere/model"), "data", corpus="/nowhere/corpus")
    with pytest.raises(DataError, match="there is no corpus at /nowhere/corpus"):
        plan("train", elsewhere, world_size=2)
    with pytest.raises(CheckpointError, match="/nowhere/model does not exist"):
        plan("train", changed(elsewhere, "data", corpus=run.data.corpus), world_size=2)
    missing = plan("train", elsewhere, world_size=2, allow_missing=True).missing
    assert ["model.hf /nowhere/model is not here" in missing[0], "data.corpus /nowhere" in missing[1]] == [True, True]
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    geometry = str(tmp_path / "config.json")
    assert "memory" in lines(elsewhere, model_config=geometry, allow_missing=True)


def test_layouts_that_do_not_fit_are_refused(run: Config) -> None:
    with pytest.raises(ConfigError, match="2 layers do not divide into 4 pipeline stages"):
        plan("train", changed(run, "parallel", pipeline=4), world_size=4)
    with pytest.raises(ConfigError, match="does not divide the world size of 2 processes"):
        plan("train", changed(run, "parallel", tensor=4), world_size=2)


def test_a_disk_that_is_too_small_is_reported(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("megatron_iwsft.train.plan.shutil.disk_usage", lambda path: usage)
    assert "may be needed" in plan("train", run, world_size=2).missing[0]


@pytest.mark.command
def test_the_command(run: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    done = run_python("-m", "megatron_iwsft", "train", "--config", path, "--dry-run", "--gpus", "2")
    assert done.returncode == 0, done.stderr
    assert "\nsteps        5: 1" in done.stdout and "\nmemory " in done.stdout


def test_under_torchrun_the_first_process_alone_plans(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.run(["train", "--config", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_the_number_of_processes_is_asked_for(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    with pytest.raises(ConfigError, match="--dry-run needs the number of processes"):
        cli.run(["train", "--config", str(path), "--dry-run"])
    with pytest.raises(ConfigError, match="--gpus goes with --dry-run"):
        cli.run(["reference", "--config", str(path), "--gpus", "2"])
