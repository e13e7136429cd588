"""What trackers are given: TensorBoard's steps once after a resume, checkpoints as artifacts that refer to their directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks.custom import guarded
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.trackers import tensorboard_logger, wandb_logger
from megatron_iwsft.train.callbacks.wandb_file import last_step
from tests.callbacks.test_damaged_logs import CONFIG, result
from tests.support import tiny
from tests.train.test_profile import logged_steps, wandb_records


class Board:
    """What TensorBoard shows of the writers of one directory: a `purge_step` hides that step and later ones of the writers before."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, float, int]] = []

    def writer(self, directory: str, purge_step: int | None = None) -> Board:
        if purge_step is not None:
            self.shown = [point for point in self.shown if point[2] < purge_step]
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.shown.append((name, value, step))

    def flush(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    found, module = Board(), ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = found.writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return found


def test_tensorboard_shows_each_step_of_a_resumed_run_once(board: Board, tmp_path: Path) -> None:
    def run(resumed_at: int, steps: range) -> None:
        with ExitStack() as at_exit:
            log: Callable[[StepResult], None] = tensorboard_logger(tmp_path, resumed_at, at_exit)
            for step in steps:
                log(result(step, loss=float(step), data_s=0.5))

    run(0, range(1, 6))
    run(3, range(4, 8))  # killed after step 5, with a checkpoint of step 3
    for name in ("train/loss", "perf/data_s"):
        assert [step for found, _, step in board.shown if found == name] == list(range(1, 8))
    assert {name for name, *_ in board.shown} == {"train/loss", "perf/data_s"}, "a step has no point of its own"


def test_a_tracker_that_fails_does_not_end_the_run(board: Board, tmp_path: Path, monkeypatch) -> None:
    """As on a full disk: at every step, and when it is closed."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board, "flush", full)
    monkeypatch.setattr(board, "close", full)
    events = tmp_path / "events.jsonl"
    with ExitStack() as at_exit:
        log = guarded("TensorBoard logger", tensorboard_logger(tmp_path, 0, at_exit), Events(events))
        for step in (1, 2, 3):
            assert log(result(step)) is None
    (event,) = map(json.loads, events.read_text().splitlines())
    assert event["step"] == 1 and "TensorBoard logger failed" in event["text"] and "No space left" in event["text"]


@pytest.mark.command
def test_wandb_has_each_step_once_however_a_run_ended(tmp_path: Path) -> None:
    """Rows that were not written when it was killed are logged, those that a resumed run repeats are not."""
    pytest.importorskip("wandb")
    config = parse_config(CONFIG, [f"run.dir={tmp_path}", "logging.wandb={mode: offline}"], where="test")

    def row(step: int) -> dict[str, float]:
        return {"step": step, "loss": float(step), "data_s": 0.5, "step_time_s": 1.0}

    for kept, steps in ((2, range(3, 6)), (3, range(4, 8))):
        tiny.write_jsonl(tmp_path / "metrics.jsonl", [row(step) for step in range(1, kept + 1)])
        with ExitStack() as at_exit:
            log = wandb_logger(config, Events(tmp_path / "events.jsonl"), at_exit)
            for step in steps:
                log(StepResult(step, 9, row(step), False, config))
    assert logged_steps(tmp_path) == list(range(1, 8))
    run_id = (tmp_path / "wandb.id").read_text().strip()
    assert last_step(tmp_path, run_id) == 7
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        path.write_bytes(path.read_bytes()[:50] + b"damaged")
    assert last_step(tmp_path, run_id) == -1


@pytest.mark.command
def test_an_artifact_refers_to_the_newest_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for step in (2, 4):
        directory = tmp_path / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "iwsft.json").write_text("{}")
        (directory / "weights").write_bytes(bytes(100_000))
    overrides = [f"run.dir={tmp_path}", "logging.wandb={mode: offline, artifacts: true}"]
    with ExitStack() as at_exit:
        wandb_logger(parse_config(CONFIG, overrides, where="test"), Events(tmp_path / "events.jsonl"), at_exit)
    found = []
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for content in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "artifact":
            found.append(record.artifact)
    (artifact,) = found
    assert artifact.type == "checkpoint" and json.loads(artifact.metadata) == {"step": 4}
    newest = tmp_path / "checkpoints" / "step-00000004"
    assert [entry.ref for entry in artifact.manifest.contents] == [
        (newest / name).as_uri() for name in ("iwsft.json", "weights")
    ]
    assert sum(file.stat().st_size for file in tmp_path.glob("wandb/**/*") if file.is_file()) < 100_000, "no copy"
