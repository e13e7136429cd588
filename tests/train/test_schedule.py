"""Learning-rate schedules: their shapes, and that a continued run's rate does not jump unnoticed."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iwsft.config.schema import Config, Optimizer
from megatron_iwsft.testing import comparable_metrics
from megatron_iwsft.train.schedule import Schedule, Shape
from tests.support import events
from tests.support.shared_runs import assert_same_checkpoints, copy_without_checkpoints_after, train_on
from tests.support.small_runs import small_run

LR = 1e-3


def settings(**changes: Any) -> Optimizer:
    return Optimizer(**{"lr": LR, "min_lr": 1e-4, "warmup_fraction": 0.1} | changes)


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "wd_mult": 0.0}]
    return torch.optim.SGD(groups, lr=1.0)


def rates(schedule: Schedule, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        out.append(schedule.rate)
        schedule.step()
    return out


def test_the_first_step_learns_and_the_last_warm_up_step_has_the_peak() -> None:
    found = rates(Schedule(optimizer(), settings(), 100), 100)
    assert found[:10] == pytest.approx([LR * k / 10 for k in range(1, 11)])
    assert max(found) == found[9] == LR and all(a >= b for a, b in itertools.pairwise(found[9:]))


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "wsd"])
def test_after_warm_up_it_is_as_megatron_cores(style: str) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    ours = Schedule(optimizer(), settings(schedule=style, weight_decay=0.3), 100)
    reference_optimizer = optimizer()
    reference = OptimizerParamScheduler(
        reference_optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=1e-4,
        lr_warmup_steps=10,
        lr_decay_steps=100,
        lr_decay_style=style.replace("wsd", "WSD"),
        start_wd=0.3,
        end_wd=0.3,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=20,
        lr_wsd_decay_style="linear",
    )
    expected = []
    for _ in range(100):
        expected.append(reference_optimizer.param_groups[0]["lr"])
        reference.step(1)
    assert rates(ours, 100)[10:] == pytest.approx(expected[10:], rel=1e-12)
    assert [group["weight_decay"] for group in ours._optimizer.param_groups] == [0.3, 0.0]


def test_wsd_does_not_change_where_it_is_stable() -> None:
    short, long = (Shape.of(settings(schedule="wsd", warmup_fraction=0.0), total) for total in (100, 300))
    assert short.at(79) == long.at(79) == LR > short.at(81)


def test_a_continued_run_reports_another_rate_and_can_move_there() -> None:
    first = Schedule(optimizer(), settings(), 100)
    rates(first, 90)
    at_once = Schedule(optimizer(), settings(), 200)
    at_once.load_state_dict(first.state_dict())
    assert at_once.changed == (first.rate, Shape.of(settings(), 200).at(90))
    assert "optimizer.rewarm_steps" in at_once.described_change()

    slowly = Schedule(optimizer(), settings(rewarm_steps=10), 200)
    slowly.load_state_dict(first.state_dict())
    again = Schedule(optimizer(), settings(rewarm_steps=10), 200)
    begun = rates(slowly, 4)
    again.load_state_dict(slowly.state_dict())  # interrupted, and continued with the same settings
    assert again.changed is None and again.described_change() == ""
    found = begun + rates(again, 10)
    target = [Shape.of(settings(), 200).at(k) for k in range(90, 104)]
    assert first.rate < found[0] < target[0] / 2 and found[9:] == target[9:]


def test_an_unchanged_schedule_is_continued_in_silence() -> None:
    first = Schedule(optimizer(), settings(), 100)
    expected = rates(first, 60)
    second = Schedule(optimizer(), settings(), 100)
    half = Schedule(optimizer(), settings(), 100)
    rates(half, 30)
    second.load_state_dict(half.state_dict())
    assert second.changed is None and rates(second, 30) == expected[30:]


def test_a_state_of_megatron_cores_scheduler_is_read() -> None:
    state = dict(max_lr=LR, min_lr=1e-4, lr_warmup_steps=10, lr_decay_steps=100, lr_decay_style="cosine", num_steps=50)
    schedule = Schedule(optimizer(), settings(), 100)
    schedule.load_state_dict(state)
    assert schedule.changed is None and schedule.rate == Shape.of(settings(), 100).at(50)


def continued(config: Config, **optimizer: Any) -> Config:
    data = config.data.model_copy(update={"max_steps": 10})
    checkpoint = config.checkpoint.model_copy(update={"every": 2, "keep": 9})
    changed = config.optimizer.model_copy(update=optimizer)
    return config.model_copy(update={"data": data, "checkpoint": checkpoint, "optimizer": changed})


@pytest.mark.slow
@pytest.mark.parallel
def test_a_longer_run_moves_to_its_new_rate_and_resumes_on_the_way(tmp_path: Path) -> None:
    first = small_run(tmp_path, "first", "optimizer.lr=1e-3")
    train_on(2, first)
    last = comparable_metrics(tmp_path / "first")[-1]["lr"]
    for name in ("at-once", "slowly"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    runs = {
        name: first.run.model_copy(update={"dir": str(tmp_path / name)}) for name in ("at-once", "slowly", "resumed")
    }
    at_once = continued(first.model_copy(update={"run": runs["at-once"]}))
    slowly = continued(first.model_copy(update={"run": runs["slowly"]}), rewarm_steps=4)
    train_on(2, at_once)
    train_on(2, slowly)
    (event,) = events(tmp_path / "at-once", "learning rate")
    found = {name: [line["lr"] for line in comparable_metrics(tmp_path / name)] for name in ("at-once", "slowly")}
    assert event["before"] == 0 and event["now"] == found["at-once"][5] > 4 * last > 0
    assert found["slowly"][5] == pytest.approx(found["at-once"][5] / 4)
    assert found["slowly"][8:] == found["at-once"][8:]
    copy_without_checkpoints_after(6, tmp_path / "slowly", tmp_path / "resumed")
    train_on(2, slowly.model_copy(update={"run": runs["resumed"]}))
    assert comparable_metrics(tmp_path / "resumed") == comparable_metrics(tmp_path / "slowly")
    assert_same_checkpoints(tmp_path / "resumed", tmp_path / "slowly")
