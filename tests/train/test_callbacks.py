"""Warnings about degenerate importance weights, at most once per hundred steps."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Logging
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.weight_warnings import WeightWarnings

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
