"""Users' callbacks (`logging.callbacks`) and `Trainer.add_callback`, in the trainer on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.testing import comparable_metrics
from tests.support import events
from tests.support.jobs import run_each
from tests.support.shared_runs import SharedRuns, train_job, train_on
from tests.support.small_runs import small_run

pytestmark = pytest.mark.parallel

CALLBACKS = """
import json, os, pathlib

def note(name, result):
    rank = os.environ["RANK"]
    with open(pathlib.Path(__file__).with_name(f"{name}-rank-{rank}.jsonl"), "a") as file:
        file.write(json.dumps({"step": result.step, "is_last": result.is_last, "loss": result.metrics["loss"]}) + "\\n")

def every_step(result):
    note("every_step", result)

def every_second(result):
    note("every_second", result)
every_second.every = 2

def every_second_and_at_end(result):
    note("every_second_and_at_end", result)
every_second_and_at_end.every, every_second_and_at_end.at_end = 2, True

def only_at_end(result):
    note("only_at_end", result)
only_at_end.every, only_at_end.at_end = 0, True

def on_every_rank(result):
    note("on_every_rank", result)
    return {"from_every_rank": 10 * result.step}
on_every_rank.collective = True

def broken(result):
    note("broken", result)
    raise ValueError("out of paper")

def backwards(result): ...
backwards.every = -1

constant = 3
"""
NAMES = ["every_step", "every_second", "every_second_and_at_end", "only_at_end", "on_every_rank", "broken"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("callbacks")
    (directory / "mine.py").write_text(CALLBACKS)
    return directory


@pytest.fixture(scope="module")
def run(directory: Path) -> Path:
    """A run with all the callbacks that can be loaded."""
    callbacks = json.dumps([f"{directory}/mine.py:{name}" for name in NAMES])
    train_on(2, small_run(directory, "run", f"logging.callbacks={callbacks}"))
    return directory / "run"


def calls(run: Path, name: str, rank: int) -> list[dict] | None:
    """What a callback noted on a rank; None if it was not called there."""
    path = run.parent / f"{name}-rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("every_step", [1, 2, 3, 4, 5]),
        ("every_second", [2, 4]),
        ("every_second_and_at_end", [2, 4, 5]),
        ("only_at_end", [5]),
    ],
)
def test_a_callback_is_called_on_the_main_rank_when_it_is_due(name: str, steps: list[int], run: Path) -> None:
    lines = comparable_metrics(run)
    expected = [{"step": step, "is_last": step == 5, "loss": lines[step - 1]["loss"]} for step in steps]
    assert calls(run, name, 0) == expected
    assert calls(run, name, 1) is None


def test_a_collective_callback_is_called_on_every_rank(run: Path) -> None:
    on_first, on_second = (calls(run, "on_every_rank", rank) for rank in range(2))
    assert on_first == on_second
    assert on_first is not None and [call["step"] for call in on_first] == [1, 2, 3, 4, 5]


def test_the_dict_of_a_collective_callback_is_logged(run: Path) -> None:
    assert [m["from_every_rank"] for m in comparable_metrics(run)] == [10, 20, 30, 40, 50]


def test_a_callback_that_raises_is_reported_once_and_not_called_again(run: Path) -> None:
    assert [call["step"] for call in calls(run, "broken", 0) or []] == [1]
    (event,) = events(run, "callback failed")
    assert event["step"] == 1
    assert "mine.py:broken failed at step 1" in event["text"] and "ValueError: out of paper" in event["text"]
    assert len(comparable_metrics(run)) == 5 and len(events(run, "finished")) == 1


MISTAKES = {
    "nowhere.py:mine": "is not a Python file",
    "mine.py:missing": "does not define missing",
    "mine.py:constant": "is not a function",
    "mine.py:backwards": r"backwards.every must be a number of steps; found -1",
}


def config_error(platform, settings) -> str:
    with pytest.raises(ConfigError) as error:
        train_job(platform, settings)
    return str(error.value)


@pytest.fixture(scope="module")
def messages(directory: Path) -> dict[str, str | Exception]:
    cases = {
        name: (small_run(directory, f"mistake-{i}", f"logging.callbacks=['{directory}/{name}']"),)
        for i, name in enumerate(MISTAKES)
    }
    return run_each(config_error, 2, cases)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_callback_that_cannot_be_used_is_a_config_error(name: str, messages: dict[str, str | Exception]) -> None:
    found = messages[name]
    assert isinstance(found, str), found
    assert "logging.callbacks" in found and MISTAKES[name] in found


def order_of_callbacks(platform, settings) -> list[tuple[str, int, bool]]:
    """Train one step with callbacks from code: (name, rank, whether metrics.jsonl and a checkpoint had this step) of each call."""
    from contextlib import ExitStack

    from megatron_iwsft.distributed.stop_signals import StopSignals
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.setup import start
    from megatron_iwsft.train.trainer import Trainer

    seen = []
    run_directory = Path(settings.run.dir)

    def watching(name: str):
        def function(result):
            logged = any(line["step"] == result.step for line in comparable_metrics(run_directory))
            saved = (run_directory / "checkpoints" / "latest").exists()
            seen.append((name, logged, saved, "eval/held-out/nll" in result.metrics, "added" in result.metrics))
            return {"added": float(result.step)} if name == "collective" else None

        return function

    with StopSignals() as stop:
        run = start(check(settings, world_size=platform.world_size))
        with run.watchdog() as watch, ExitStack() as at_exit:
            trainer = Trainer(run, watch, stop, at_exit)
            trainer.add_callback(watching("main rank"))
            trainer.add_callback(watching("collective"), collective=True)
            trainer.train()
    return seen


def test_added_callbacks_run_after_evaluation_and_before_saving(directory: Path) -> None:
    """A collective one before logging, so that what it returns is logged; one on the main rank after it."""
    evaluation = ("evaluation.every=1", f"evaluation.sets=[{{name: held-out, corpus: {directory}/corpus}}]")
    settings = small_run(directory, "added", "data.max_steps=1", "checkpoint.every=1", *evaluation)
    outcomes = run_each(orders_on_all_ranks, 2, {"order": (settings,)})
    on_main, on_other = outcomes["order"]
    # (name, metrics.jsonl has the step, saved, evaluated, the collective one's dict is there)
    assert on_main == [("collective", False, False, True, False), ("main rank", True, False, True, True)]
    assert [call[0] for call in on_other] == ["collective"]
    at_start, line = comparable_metrics(directory / "added")
    assert "added" not in at_start and "eval/held-out/nll" in at_start
    assert line["added"] == 1.0 and "eval/held-out/nll" in line


def orders_on_all_ranks(platform, settings) -> list[list]:
    import torch.distributed as dist

    out: list = [None] * platform.world_size
    dist.all_gather_object(out, order_of_callbacks(platform, settings))
    return out


def test_a_run_with_callbacks_computes_the_same_numbers(directory: Path, run: Path) -> None:
    runs = SharedRuns(directory, lambda _, name: small_run(directory, name))
    without = comparable_metrics(runs("without-callbacks"))
    assert [{k: v for k, v in m.items() if k != "from_every_rank"} for m in comparable_metrics(run)] == without
