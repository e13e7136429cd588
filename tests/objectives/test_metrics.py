"""The table of metrics: its sums exist, its names are unique and documented."""

from __future__ import annotations

import math

import pytest

from megatron_iwsft.objectives.functions import OBJECTIVES
from megatron_iwsft.objectives.loss import SUMS, reported_metrics, sum_names
from megatron_iwsft.objectives.metrics import METRICS, Metric, summarize
from tests.support import ROOT


def test_names_are_unique_and_every_sum_exists() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert {metric.numerator, metric.denominator} - {None} <= set(SUMS)
        sources = [metric.numerator is not None, metric.derived is not None, metric.measured]
        assert sum(sources) == 1, f"{metric.name} needs one source"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_documented(metric: Metric) -> None:
    assert metric.title
    if metric.name not in ("step", "epoch"):
        assert f"`{metric.name}`" in (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_trained_tokens_has_undefined_ratios(name: str) -> None:
    sums = dict.fromkeys([*sum_names(OBJECTIVES[name]), "weight_max"], 0.0)
    found = summarize(sums, reported_metrics(OBJECTIVES[name]))
    assert math.isnan(found["loss"]) and math.isnan(found["nll"]) and found["trained_tokens"] == 0
    assert ("weight_mean" in found) == OBJECTIVES[name].weighted
    assert ("weighted_log_ratio" in found) == OBJECTIVES[name].needs_reference
    assert not {"bound_sft", "bound_iw", "kl_from_reference"} & found.keys()
