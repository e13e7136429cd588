"""A custom objective with a metric of its own, in the trainer: the metric is a ratio of sums over all micro-batches and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_iwsft.config.schema import Config
from megatron_iwsft.testing import comparable_metrics
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from tests.support import plain_model
from tests.support.shared_runs import SharedRuns
from tests.support.small_runs import small_run

pytestmark = pytest.mark.parallel

OBJECTIVE = """
import torch
from megatron_iwsft.objectives.functions import Objective, Weighted
from megatron_iwsft.objectives.metrics import Metric


def sharpened(t, s):
    w = (0.5 * t.logprobs.detach()).exp() * t.mask
    return Weighted(loss=-w * t.logprobs, weight=w, clipped=torch.zeros_like(w), extra={"squares": t.logprobs.detach() ** 2 * t.mask})


mine = Objective("sharpened", sharpened, needs_reference=False,
                 metrics=(Metric("mean_square", "mean squared log-prob", "squares", "tokens"),
                          Metric("mean_square_per_weight", "squares per weight", "squares", "token_weight")))
"""


def prepare(runs: SharedRuns, name: str) -> Config:
    """At data parallel 2: four micro-batches per step, two on each rank."""
    custom = f"objective={{name: '{runs.directory}/custom.py:mine'}}"
    return small_run(runs.directory, name, custom, "data.max_steps=1")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("objective")
    (directory / "custom.py").write_text(OBJECTIVE)
    return directory


def expected_metrics(settings: Config) -> dict[str, float]:
    """Of the first step, by the formulas, in float64 and plain torch."""
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.hf.mapping import shapes

    mixture, model = open_mixture(settings), settings.model.config
    arch = Architecture.from_hf(model, where="test")
    source = RandomInit(arch, settings.run.seed)
    weights = {name: source.read(name, (0, 0, shape[0])).double() for name, shape in shapes(arch).items()}
    trained = []
    for i in np.concatenate(make_sampler(settings, mixture).packs_at(0)).tolist():
        tokens = torch.from_numpy(mixture.tokens(i).astype(np.int64))
        mask = torch.from_numpy(mixture.mask(i)[1:].astype(bool))
        trained.append(plain_model.logprobs(weights, model, tokens)[mask])
    logprobs = torch.cat(trained)
    w, squares = (0.5 * logprobs).exp(), (logprobs**2).sum()
    return {
        "loss": -(w * logprobs).mean().item(),
        "mean_square": squares.item() / len(logprobs),
        "mean_square_per_weight": (squares / w.sum()).item(),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_custom_objectives_own_metrics_are_logged(world_size: int, directory: Path) -> None:
    runs = SharedRuns(directory, prepare, world_size=world_size)
    name = f"on-{world_size}"
    (line,) = comparable_metrics(runs(name))
    for metric, value in expected_metrics(prepare(runs, name)).items():
        assert line[metric] == pytest.approx(value, rel=1e-5), metric
