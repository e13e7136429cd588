"""`run.profile`, the coarse breakdown of every step, and trackers that a resumed run does not confuse."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.config.schema import Config, Profile
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.check import check
from megatron_iwsft.train.profiling import StepProfiler
from tests.support import events
from tests.support.shared_runs import assert_same_checkpoints, train_job, train_on
from tests.support.small_runs import small_run

PROFILED = ("run.profile={steps: [2, 4]}", "checkpoint={every: 2, keep: 9}", "logging={wandb: {mode: offline}}")
PHASES = ("data_s", "forward_backward_s", "reduce_s", "optimizer_s")


def wandb_records(path: Path) -> Iterator[bytes]:
    """Of an offline wandb file: LevelDB's log format (blocks of 32 KiB; CRC, length and type before each fragment), after 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # padding
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # complete, or the last fragment
            yield whole
            whole = b""


def logged_steps(run: Path) -> list[int]:
    """The step of every row that the offline wandb runs below `run` hold, in order."""
    from wandb.proto import wandb_internal_pb2

    out = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                names = {item.key or "/".join(item.nested_key) for item in record.history.item}
                assert {"train/loss", "perf/data_s", "perf/step_time_s"} <= names
                out.append(record.history.step.num)
    return out


def die_profiling(platform: Any, settings: Config) -> None:
    """Train, and end the first rank's process within the profile: after step 3, as SIGKILL would."""
    after = StepProfiler.after

    def or_die(self: StepProfiler, step: int) -> str | None:
        if step == 3 and platform.rank == 0:
            os._exit(9)
        return after(self, step)

    StepProfiler.after = or_die  # type: ignore[method-assign]
    train_job(platform, settings)


@pytest.mark.slow
@pytest.mark.parallel
def test_a_profiled_run_is_the_same_run_and_resumes_within_its_profile(tmp_path: Path) -> None:
    profiled, plain = small_run(tmp_path, "profiled", *PROFILED), small_run(tmp_path, "plain", "checkpoint.every=2")
    train_on(2, profiled)
    train_on(2, plain)
    assert comparable_metrics(tmp_path / "profiled") == comparable_metrics(tmp_path / "plain")
    directory = tmp_path / "profiled" / "logs" / "profile"
    assert sorted(path.name for path in directory.iterdir()) == ["rank-0-steps-2-4.json.gz", "rank-0-steps-2-4.txt"]
    trace = json.loads(gzip.decompress((directory / "rank-0-steps-2-4.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"iwsft: data", "iwsft: forward", "iwsft: optimizer", "iwsft: callbacks"} <= names
    table = (directory / "rank-0-steps-2-4.txt").read_text()
    for row in ("data", "forward and backward", "  loss operator, forward", "  loss operator, backward", "optimizer"):
        assert f"\n{row} " in table
    assert all(f"\n{what}, in all of these " in table for what in ("matmuls", "attention", "communication"))
    assert logged_steps(tmp_path / "profiled") == [1, 2, 3, 4, 5]

    killed = small_run(tmp_path, "killed", *PROFILED)
    with pytest.raises(AssertionError):
        run_distributed(die_profiling, 2, killed)
    assert not (tmp_path / "killed" / "logs" / "profile").exists()
    train_on(2, killed)
    assert events(tmp_path / "killed", "resumed")
    assert comparable_metrics(tmp_path / "killed") == comparable_metrics(tmp_path / "plain")
    assert_same_checkpoints(tmp_path / "killed", tmp_path / "plain")
    assert (tmp_path / "killed" / "logs" / "profile" / "rank-0-steps-3-4.txt").exists()
    assert logged_steps(tmp_path / "killed") == [1, 2, 3, 4, 5]  # also those that were not written when it died

    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < sum(line[name] for name in PHASES) <= line["step_time_s"] for line in lines)
    assert ["between_steps_s" in line for line in lines] == [False, True, True, True, True]


def profiled(directory: Path) -> str | None:
    profiler = StepProfiler(Profile(steps=[1, 1]), 0, directory, is_cuda=False)
    profiler.before(1)
    return profiler.after(1)


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    said = profiled(tmp_path / "profile")
    assert said is not None and "could not be written" in said and "Training continues." in said


def test_a_profile_follows_no_planted_link(tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "profile"
    victim.write_text("precious")
    directory.mkdir()
    for name in ("rank-0-steps-1-1.json.gz", "rank-0-steps-1-1.txt"):
        (directory / name).symlink_to(victim)
    profiled(directory)
    assert victim.read_text() == "precious"
    assert len(list(directory.iterdir())) == 2 and not [p for p in directory.iterdir() if p.is_symlink()]


def test_a_profile_of_steps_or_ranks_that_are_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends at step 9, but the run ends at step 5 \(data.max_steps\)"):
        small_run(tmp_path, "run", "run.profile.steps=[2, 9]")
    with pytest.raises(ConfigError, match=r"steps must be \[first, last\]; found \[4, 2\]"):
        small_run(tmp_path, "run", "run.profile.steps=[4, 2]")
    by_epochs = small_run(tmp_path, "run", "run.profile.steps=[2, 900]", "data.max_steps=null", "data.epochs=1")
    with pytest.raises(ConfigError, match=r"ends at step 900, but the run ends at step \d+ \(data.epochs\)"):
        check(by_epochs, world_size=2)
    with pytest.raises(ConfigError, match=r"run\.profile\.ranks has 2, but the ranks of this job are 0 to 1"):
        check(small_run(tmp_path, "run", "run.profile={steps: [2, 4], ranks: [0, 2]}"), world_size=2)
