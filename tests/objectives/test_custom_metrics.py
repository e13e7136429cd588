"""Metrics of a custom objective are checked before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.custom import find_objective
from megatron_iwsft.objectives.functions import OBJECTIVES
from megatron_iwsft.objectives.metrics import Metric

FILE = """
import torch
from megatron_iwsft.objectives.functions import Objective, Weighted
from megatron_iwsft.objectives.metrics import Metric

def mine(t, s):
    w = torch.sigmoid(t.proposal - t.reference) * t.mask
    return Weighted(loss=-w * t.logprobs, weight=w, clipped=torch.zeros_like(w), extra=EXTRA)

own = Objective("own", mine, metrics=(METRICS,))
"""


def find(directory: Path, metrics: str, extra: str = "{'squares': w * w}") -> None:
    (directory / "own.py").write_text(FILE.replace("METRICS", metrics).replace("EXTRA", extra))
    find_objective(f"{directory}/own.py:own")


@pytest.mark.parametrize(
    "metrics",
    [
        "Metric('square', 'mean squared weight', 'squares', 'tokens')",
        "Metric('pair', 'two sums', derived=lambda s: [s['tokens'], s['squares']]), Metric('sum', 'sum', 'squares')",
        "Metric('largest', 'largest weight', derived=lambda s: s['weight_max'])",
    ],
)
def test_sound_metrics_are_accepted(tmp_path: Path, metrics: str) -> None:
    find(tmp_path, metrics)


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ("Metric('loss', 'mine', 'squares', 'tokens')", "already a metric 'loss'. Choose another name"),
        ("Metric('lr', 'mine', 'squares', 'tokens')", "already a metric 'lr'"),
        ("Metric('a', 'A', 'squares'), Metric('a', 'B', 'squares')", "already a metric 'a'"),
        ("Metric('x', 'y')", "metric 'x' needs one of numerator, derived and measured; it has none"),
        ("Metric('x', 'y', 'squares', derived=len)", "it has numerator, derived"),
        ("Metric('x', 'y', denominator='tokens', derived=len)", "a denominator without a numerator"),
        ("Metric('x', 'y', measured=True)", "only the trainer's own metrics are"),
        (
            "Metric('x', 'y', derived=lambda s: s['sqares'])",
            "metric 'x' fails: KeyError: 'sqares'. It can read the sums loss,",
        ),
        ("Metric('x', 'y', derived=lambda s: s['squares'])", "if a metric names it as numerator or denominator"),
        ("Metric('x', 'y', derived=lambda s: 'high')", "must be a number or a list of numbers; found str"),
        ("Metric('x', 'y', 'cubes')", "must return extra['cubes'] as float32 [T]"),
    ],
)
def test_unsound_metrics_are_refused(tmp_path: Path, metrics: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(tmp_path, metrics)
    assert complaint in str(error.value)


def test_an_extra_sum_must_not_have_the_name_of_a_built_in_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tokens'.*is the name of a built-in sum\. Rename it"):
        find(tmp_path, "Metric('x', 'y', 'tokens')", extra="{'tokens': w}")


def test_metrics_need_exactly_one_source() -> None:
    with pytest.raises(ConfigError, match="metric 'x' needs one of numerator, derived and measured"):
        Metric("x", "y")


def test_objectives_are_hashable() -> None:
    assert len(set(OBJECTIVES.values())) == len(OBJECTIVES)
