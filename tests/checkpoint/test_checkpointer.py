"""`Checkpointer`: which checkpoint is loaded, what is saved when, and what happens to saves that fail."""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.checkpoint.checkpointer import Checkpointer
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Checkpoint
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.testing import run_distributed
from tests.support import tiny

pytestmark = pytest.mark.parallel


class StepNumber:
    """A host state that holds the step at which it was saved."""

    def __init__(self, state: TrainState) -> None:
        self.train_state, self.loaded = state, 0

    def state(self) -> dict[str, Any]:
        return {"step": self.train_state.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loaded = state["step"]


class UnreliableWriter(CheckpointWriter):
    """Saves fail while `outcomes` has False next; after its end they succeed. attempts: steps at which a save was tried."""

    def __init__(self, *arguments: Any, outcomes: list[bool], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.outcomes, self.attempts = iter(outcomes), []

    def save(self, state: TrainState) -> Path:
        self.attempts.append(state.step)
        if not next(self.outcomes, True):
            raise CheckpointError("the disk is on fire.")
        return super().save(state)


class Fixture:
    """A checkpointer of a one-layer model whose parameters all equal the step, and what it has reported."""

    def __init__(self, platform: Any, directory: Path, outcomes: list[bool], **settings: Any) -> None:
        parallel = platform.parallel(tensor=2)
        config = tiny.model_config(num_hidden_layers=1, hidden_size=32, intermediate_size=48)
        architecture = Architecture.from_hf(config, where="test")
        self.state = TrainState(build_model(architecture, parallel, platform, ModelSettings(dtype=torch.float32)))
        self.host = self.state.host["step"] = StepNumber(self.state)
        self.writer = UnreliableWriter(directory, architecture, layout=parallel.layout, outcomes=outcomes)
        self.reports: list[tuple[str, str, int | None]] = []
        self.checkpointer = Checkpointer(
            self.writer,
            self.state,
            Checkpoint(**settings),
            accept=self.accept,
            report=lambda event, text, **details: self.reports.append((event, text, details.get("step"))),
        )
        self.rejects = False

    def accept(self, info: Any) -> None:
        if self.rejects:
            raise ConfigError("this is another run's checkpoint.")

    def at(self, step: int) -> None:
        self.state.step = step
        with torch.no_grad():
            for parameter in self.state.policy[0].parameters():
                parameter.fill_(step)

    def save_steps(self, *steps: int) -> None:
        for step in steps:
            self.at(step)
            assert self.checkpointer.save_now()
        self.at(99)
        self.reports.clear()

    @property
    def loaded(self) -> dict[str, set]:
        """The values of the parameters, and the step in the host state."""
        values = {float(x) for p in self.state.policy[0].parameters() for x in p.detach().unique()}
        return {"parameters": values, "host": {self.host.loaded}}

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in self.checkpointer.directory.iterdir())


def save_among_leftovers(platform: Any, directory: Path) -> tuple[list[str], str]:
    fixture = Fixture(platform, directory, [])
    fixture.save_steps(1)
    if platform.rank == 0:
        for name in ("step-00000001.0123abcd.partial", "step-00000001.partial", "step-00000001-best.0123abcd.partial"):
            (directory / name).mkdir()
        (directory / "latest").unlink()
        (directory / "latest").mkdir()
    dist.barrier()
    second = Fixture(platform, directory, [])
    second.save_steps(2)
    return second.saved, (directory / "latest").read_text()


def test_a_save_removes_what_a_killed_run_left_and_nothing_of_the_user(tmp_path: Path) -> None:
    """And a directory in the place of `latest` is moved aside."""
    saved, latest = run_distributed(save_among_leftovers, 2, tmp_path / "checkpoints")[0]
    ours = ["latest", "latest.damaged-1", "step-00000001", "step-00000002"]
    assert saved == sorted([*ours, "step-00000001.partial", "step-00000001-best.0123abcd.partial"])
    assert latest == "step-00000002\n"


def truncate(platform: Any, directory: Path, pattern: str) -> None:
    """Truncate files on the first rank, before any rank continues."""
    if platform.rank == 0:
        files = list(directory.glob(pattern))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:-100])
    dist.barrier()


def load_newest_of_damaged(platform: Any, directory: Path, damaged: list[str]) -> tuple[Any, ...]:
    fixture = Fixture(platform, directory, [])
    fixture.save_steps(1, 2, 3)
    for pattern in damaged:
        truncate(platform, directory, pattern)
    info = fixture.checkpointer.load_newest()
    assert info is not None
    saves = len(fixture.writer.attempts)
    fixture.state.step = info.step
    again = fixture.checkpointer.save_now() and len(fixture.writer.attempts) > saves
    return info.step, fixture.loaded, [report[:2] for report in fixture.reports], again


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ([], 3),
        (["step-00000003/__1_*.distcp"], 2),  # a shard that only one rank reads
        (["step-00000003/.metadata"], 2),
        (["step-00000003/*.distcp", "step-00000002/iwsft.json"], 1),
    ],
    ids=["none", "one shard of the newest", "metadata of the newest", "the two newest"],
)
def test_the_newest_undamaged_checkpoint_is_loaded(damaged: list[str], expected: int, tmp_path: Path) -> None:
    ranks = run_distributed(load_newest_of_damaged, 2, tmp_path / "checkpoints", damaged)
    for step, loaded, reports, saved_again in ranks:
        assert step == expected
        assert loaded == {"parameters": {float(expected)}, "host": {expected}}
        assert [event for event, _ in reports] == ["damaged checkpoint"] * len(damaged)
        for (_, text), pattern in zip(reports, damaged, strict=True):
            assert text.startswith("skipping a checkpoint") and pattern.partition("/")[0] in text
        assert not saved_again, "the loaded checkpoint is this step's"


def failures_to_load(platform: Any, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"empty": Fixture(platform, directory, []).checkpointer.load_newest()}
    fixture = Fixture(platform, directory, [])
    fixture.save_steps(1, 2)

    def error(of: Fixture) -> tuple[type, str]:
        with pytest.raises((CheckpointError, ConfigError)) as raised:
            of.checkpointer.load_newest()
        return raised.type, str(raised.value)

    found["resume: never"] = error(Fixture(platform, directory, [], resume="never"))
    fixture.rejects = True
    found["another run"] = error(fixture)
    fixture.rejects = False
    truncate(platform, directory, "step-*/.metadata")
    found["all damaged"] = error(fixture)
    return found


@pytest.fixture(scope="module")
def load_failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(failures_to_load, 2, tmp_path_factory.mktemp("failures") / "checkpoints")[0]


def test_a_run_without_checkpoints_loads_none(load_failures: dict[str, Any]) -> None:
    assert load_failures["empty"] is None


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("resume: never", ConfigError, "checkpoint.resume is never, but"),
        ("another run", ConfigError, "this is another run's checkpoint."),
        ("all damaged", CheckpointError, "none of the 2 checkpoints in"),
    ],
)
def test_checkpoints_that_cannot_be_loaded_are_an_error(
    case: str, kind: type, message: str, load_failures: dict[str, Any]
) -> None:
    assert load_failures[case][0] is kind
    assert message in load_failures[case][1]


def roll_back(platform: Any, directory: Path, before: int) -> tuple[Any, ...]:
    fixture = Fixture(platform, directory, [])
    fixture.save_steps(1, 2, 4)
    step = fixture.checkpointer.roll_back(before=before)
    dist.barrier()
    return step, fixture.loaded, fixture.saved, (directory / "latest").read_text().strip()


def test_rolling_back_loads_an_earlier_checkpoint_and_removes_later_ones(tmp_path: Path) -> None:
    for step, loaded, saved, latest in run_distributed(roll_back, 2, tmp_path / "checkpoints", 3):
        assert step == 2
        assert loaded == {"parameters": {2.0}, "host": {2}}
        assert saved == ["latest", "step-00000001", "step-00000002"]
        assert latest == "step-00000002"


def test_rolling_back_to_before_the_first_checkpoint_changes_nothing(tmp_path: Path) -> None:
    for step, loaded, saved, latest in run_distributed(roll_back, 2, tmp_path / "checkpoints", 0):
        assert step is None
        assert loaded == {"parameters": {99.0}, "host": {0}}
        assert saved == ["latest", "step-00000001", "step-00000002", "step-00000004"]
        assert latest == "step-00000004"


def save_twice(platform: Any, directory: Path) -> tuple[Any, ...]:
    fixture = Fixture(platform, directory, [], every=2)
    fixture.at(2)
    fixture.checkpointer.after_step()
    results = [fixture.checkpointer.save_now(), fixture.checkpointer.save_now()]
    fixture.checkpointer.finish()
    fixture.at(3)
    fixture.checkpointer.after_step()
    results.append(fixture.checkpointer.save_now())
    return results, fixture.writer.attempts, [(event, step) for event, _, step in fixture.reports]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    for results, attempts, reports in run_distributed(save_twice, 2, tmp_path / "checkpoints"):
        assert results == [True, True, True]
        assert attempts == [2, 3]
        assert reports == [("saved", 2), ("saved", 3)]


def train_with_failing_saves(
    platform: Any, directory: Path, outcomes: list[bool], max_failures: int
) -> tuple[list[int], list[tuple[str, int | None]], list[str], str]:
    """Twenty steps that are saved every 10, retried after 3. Returns attempts, reports, their texts, and the error."""
    fixture = Fixture(platform, directory, outcomes, every=10, retry_after=3, max_failures=max_failures)
    error = ""
    try:
        for step in range(1, 21):
            fixture.at(step)
            fixture.checkpointer.after_step()
    except CheckpointError as raised:
        error = str(raised)
    reports = [(event, step) for event, _, step in fixture.reports]
    return fixture.writer.attempts, reports, [text for _, text, _ in fixture.reports], error


def test_a_failed_save_is_reported_and_retried(tmp_path: Path) -> None:
    outcomes = [False, False]
    for attempts, reports, texts, error in run_distributed(
        train_with_failing_saves, 2, tmp_path / "checkpoints", outcomes, 3
    ):
        assert attempts == [10, 13, 16, 20]
        assert reports == [("save failed", 10), ("save failed", 13), ("saved", 16), ("saved", 20)]
        assert texts[0] == (
            "saving after step 10 failed: the disk is on fire. Training continues, and the save is retried after 3 steps. "
            "There is no checkpoint yet."
        )
        assert error == ""


def test_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    for attempts, reports, _, error in run_distributed(
        train_with_failing_saves, 2, tmp_path / "checkpoints", [False] * 9, 2
    ):
        assert attempts == [10, 13]
        assert reports == [("save failed", 10)]
        assert error == (
            "the disk is on fire. This is failure 2 in a row (checkpoint.max_failures), so the run ends. There is no checkpoint yet. "
            "Fix what the message names, then start the run again."
        )


def test_a_successful_save_starts_the_count_anew(tmp_path: Path) -> None:
    """With max_failures 2: one failure, a success, another failure."""
    for attempts, reports, texts, error in run_distributed(
        train_with_failing_saves, 2, tmp_path / "checkpoints", [False, True, False], 2
    ):
        assert attempts == [10, 13, 20]
        assert reports == [("save failed", 10), ("saved", 13), ("save failed", 20)]
        assert texts[2].endswith(f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000013'}.")
        assert error == ""


def finish_with_failures(platform: Any, directory: Path, outcomes: list[bool]) -> tuple[list[int], str]:
    fixture = Fixture(platform, directory, outcomes, max_failures=3)
    fixture.at(7)
    with patch("megatron_iwsft.checkpoint.checkpointer._LAST_RETRY_S", 0.0):
        try:
            fixture.checkpointer.finish()
        except CheckpointError as error:
            return fixture.writer.attempts, str(error)
    return fixture.writer.attempts, ""


@pytest.mark.parametrize(
    ("outcomes", "attempts", "message"),
    [([False, False, True], 3, ""), ([False] * 9, 3, "This is failure 3 in a row")],
    ids=["succeeds", "fails"],
)
def test_the_last_save_is_retried(outcomes: list[bool], attempts: int, message: str, tmp_path: Path) -> None:
    for found, error in run_distributed(finish_with_failures, 2, tmp_path / "checkpoints", outcomes):
        assert found == [7] * attempts
        assert message in error and bool(message) == bool(error)


def save_with_a_killed_writer(platform: Any, directory: Path) -> tuple[list[bool], list[str]]:
    fixture = Fixture(platform, directory, [], max_failures=2)
    fixture.at(5)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        patch("megatron.core.dist_checkpointing.strategies.filesystem_async._write_item", die)
        if platform.rank == 1
        else nullcontext()
    ):
        saved = [fixture.checkpointer.save_now()]
    saved.append(fixture.checkpointer.save_now())
    return saved, [text for _, text, _ in fixture.reports]


def test_a_killed_writer_fails_its_save_alone(tmp_path: Path) -> None:
    """As the kernel kills it where memory runs out."""
    for saved, (failed, complete) in run_distributed(save_with_a_killed_writer, 2, tmp_path / "checkpoints"):
        assert saved == [False, True]
        assert failed.startswith("saving after step 5 failed: ") and "could not be written: " in failed
        assert complete.startswith("saved step-00000005: ")


def save_in_one_process(platform: Any, directory: Path) -> bool:
    """Whether a save is complete whose writer may have no thread or process of its own: one of those can die unnoticed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    fixture = Fixture(platform, directory, [])
    fixture.at(5)
    trainer, write = os.getpid(), filesystem_async._write_item

    @functools.wraps(write)
    def checked(*args: Any, **kwargs: Any) -> Any:
        assert os.getppid() == trainer and threading.current_thread() is threading.main_thread()
        return write(*args, **kwargs)

    with patch.object(filesystem_async, "_write_item", checked):
        return fixture.checkpointer.save_now()


def test_a_writer_writes_its_files_itself(tmp_path: Path) -> None:
    assert run_distributed(save_in_one_process, 2, tmp_path / "checkpoints") == [True, True]


def write_without_space(platform: Any, filename: str | None) -> str:
    """What is reported of a write that finds no space: in a file, or in shared memory, whose error names none."""
    from megatron_iwsft.checkpoint.writer import _write_and_hash
    from megatron_iwsft.distributed.mcore_compat import write_results

    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    _write_and_hash(write, Path("never-read"), 0)
    return str(write_results().get_nowait())


@pytest.mark.parametrize(("filename", "named"), [(None, "device in /dev/shm"), ("/scratch/a", "device: '/scratch/a'")])
def test_a_write_without_space_names_the_place(filename: str | None, named: str) -> None:
    (message,) = run_distributed(write_without_space, 1, filename)
    assert message.endswith(named)
