"""Warnings about importance weights: before training about settings, during it at most once per hundred steps. And which epochs have the
metrics of the reference's samples.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config, Logging
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.weight_warnings import WeightWarnings, warn_about_settings
from megatron_iwsft.train.check import check
from tests.support import tiny
from tests.support.shared_runs import copy_without_checkpoints_after
from tests.support.small_runs import small_run

CONFIG = "{run: {name: r, dir: d}, model: {hf: m}, data: {corpus: c, seq_length: 8, epochs: 1}}"


def result(step: int, metrics: dict) -> StepResult:
    return StepResult(step, 500, metrics, stopping=False, config=parse_config(CONFIG, [], where="test"))


def test_degenerate_weights_are_reported_but_not_at_every_step(tmp_path: Path, capsys) -> None:
    warnings = WeightWarnings(Logging(warn_ess_below=0.3), Events(tmp_path / "events.jsonl"))
    for step in range(1, 202):
        warnings(result(step, {"weight_ess": 0.2 if step > 1 else 0.9, "clip_fraction": 0.6 if step == 7 else 0.0}))
    warnings(result(300, {"loss": 1.0}))  # an objective without weights
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in found] == [
        ("low effective sample size", 2),
        ("weights at the clip", 7),
        ("low effective sample size", 102),
    ]
    assert "20.0% of the batch" in capsys.readouterr().out


SETTINGS = {
    "τ/T too small": ("objective.temperature=1", {"weights without effect"}),
    "τ of the order of T": ("objective.temperature=100", set()),
    "the ratio itself": ("objective={level: trajectory, temperature: 1}", set()),
    "hardly the ratio": ("objective={level: trajectory, temperature: 0.001}", {"weights without effect"}),
    "token level": ("objective={level: token, temperature: 1}", set()),
    "no weights": ("objective.name=sft", set()),
    "refreshed": ("reference={source: live, refresh: 5}", set()),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("drawn_from", ["other", "reference_filtered"])
def test_settings_that_cannot_work_are_reported_before_training(tmp_path: Path, name: str, drawn_from: str) -> None:
    corpus = tiny.token_corpus(tmp_path, [300] * 8)  # of which about half is trained on
    text = f"""
run: {{name: r, dir: {tmp_path}/run}}
model: {{config: {json.dumps(tiny.model_config())}}}
data: {{corpus: {corpus.directory}, seq_length: 512, epochs: 1, drawn_from: {drawn_from}}}
objective: {{temperature: 100.0}}
"""
    override, expected = SETTINGS[name]
    run = check(parse_config(text, [override], where="test"), world_size=1)
    warn_about_settings(run, Events(tmp_path / "events.jsonl"))
    path = tmp_path / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    undone = {"refreshed reference"} if name == "refreshed" and drawn_from != "other" else set()
    assert {line["event"] for line in lines} == expected | undone
    advice = "near 1;" if "level: trajectory" in override else "trajectories' lengths, or level: trajectory;"
    for line in lines:
        if line["event"] == "weights without effect":
            assert line["exponent"] < 1.01 and advice in line["text"]
    assert run.origin_at(0) == ("other" if name == "refreshed" else drawn_from)
    assert run.origin_at(1) == "other"


def test_the_lengths_of_the_warning_are_those_of_what_is_trained_on(tmp_path: Path) -> None:
    """Half of the trajectories are long, and a quarter of the epoch."""
    for name, length in (("long", 300), ("short", 20)):
        tiny.token_corpus(tmp_path / name, [length] * 8)
    text = f"""
run: {{name: r, dir: {tmp_path}/run}}
model: {{config: {json.dumps(tiny.model_config())}}}
data:
  corpora:
    - {{corpus: {tmp_path}/long/corpus, name: long, weight: 1}}
    - {{corpus: {tmp_path}/short/corpus, name: short, weight: 3}}
  seq_length: 512
  epochs: 1
objective: {{temperature: 0.05}}
"""
    run = check(parse_config(text, [], where="test"), world_size=1)
    warn_about_settings(run, Events(tmp_path / "events.jsonl"))
    (line,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    short = np.median([int(run.mixture.mask(i)[1:].sum()) for i in range(8, 16)])
    assert line["exponent"] == pytest.approx(short / (short - 0.05), rel=0.003)


FIRST_EPOCHS = {
    "once": ("", "reference"),
    "weighted": ("data.quality={mode: weight}", "reference"),
    "one threshold": ("data.quality={mode: thresholds, thresholds: [0.5]}", "reference_filtered"),
    "two thresholds, both reached": ("data.quality={mode: thresholds, thresholds: [0.3, 0.5]}", "other"),
    "drawn with replacement": ("data.quality={mode: sample}", "other"),
    "half a pass": ("epochs: 0.5", "reference"),
    "two passes": ("epochs: 2", "other"),
    "a pass and a half": ("epochs: 1.5", "other"),
}


@pytest.mark.parametrize("name", FIRST_EPOCHS)
def test_metrics_of_samples_need_each_trajectory_once_and_all_of_them(tmp_path: Path, name: str) -> None:
    corpus = tiny.token_corpus(tmp_path, [20] * 8, scores=[0.1 * i for i in range(1, 9)])
    change, expected = FIRST_EPOCHS[name]
    mixed = change.startswith("epochs")
    corpora = f"corpora: [{{corpus: {corpus.directory}, {change}}}]" if mixed else f"corpus: {corpus.directory}"
    text = f"""
run: {{name: r, dir: {tmp_path}/run}}
model: {{config: {json.dumps(tiny.model_config())}}}
data: {{{corpora}, seq_length: 32, epochs: 2, drawn_from: reference}}
"""
    run = check(parse_config(text, [] if mixed or not change else [change], where="test"), world_size=1)
    assert run.origin_at(0) == expected
    assert run.origin_at(1) == "other"


def train_and_resume(platform, config: Config) -> None:
    """Train, and train again from the checkpoint after the first step, as after a kill."""
    from megatron_iwsft.train.trainer import train

    run = Path(config.run.dir)
    train(config)
    copy_without_checkpoints_after(1, run, run.with_name("resumed"))
    train(config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run.with_name("resumed"))})}))


@pytest.mark.parallel
def test_a_run_logs_bounds_in_its_first_epoch_and_warns_once_about_settings(tmp_path: Path) -> None:
    """Also a run that was killed and resumed."""
    config = small_run(
        tmp_path,
        "run",
        *("data.max_steps=null", "data.epochs=2", "data.global_batch_size=8", "data.drawn_from=reference_filtered"),
        "objective={name: iw_sft, temperature: 0.1}",
        "reference.source=live",
        "checkpoint={every: 1, keep: 9}",
    )
    run_distributed(train_and_resume, 1, config)
    for name in ("run", "resumed"):
        lines = comparable_metrics(tmp_path / name)
        assert {line["epoch"] for line in lines} == {0, 1}
        for line in lines:
            assert ("bound_iw" in line) == ("bound_sft_se" in line) == (line["epoch"] == 0)
            assert "kl_from_reference" not in line  # the filter's rejects are missing
        assert lines[0]["bound_iw"] == pytest.approx(1.0)  # the policy is the reference
        events = [json.loads(line) for line in (tmp_path / name / "logs" / "events.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events].count("weights without effect") == 1
