"""Runs that are stopped, killed, frozen or run out of disk: their messages, what they leave, and how they continue."""

from __future__ import annotations

import json
import re
import resource
import signal
import time
from pathlib import Path

import pytest

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_iwsft.testing import comparable_metrics
from tests.support import events, run_python, torchrun
from tests.support.launched_runs import LaunchedRun, write_config
from tests.support.small_disk import on_small_disk

pytestmark = [pytest.mark.parallel, pytest.mark.command]

SECRETS = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "hf_" + "b" * 30, "AWS_SECRET_ACCESS_KEY": "c" * 40}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), logging={"wandb": {"mode": "offline"}})


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> list[dict]:
    """The metrics of a run that nothing happens to."""
    run = LaunchedRun(config, config.parent / "uninterrupted", "logging.wandb.mode=disabled")
    assert run.finish() == 0, run.output
    return comparable_metrics(run.directory)


@pytest.mark.slow
def test_a_run_stopped_five_times_gives_the_metrics_of_an_uninterrupted_one(
    config: Path, uninterrupted: list[dict], tmp_path: Path
) -> None:
    """Stopped by a signal to torchrun, to one worker, and to all processes at once as Slurm and a terminal do. It keeps its wandb id."""
    directory, ids = tmp_path / "run", set()
    ways = [
        lambda run: run.process.send_signal(signal.SIGUSR1),
        lambda run: run.workers[1].send_signal(signal.SIGTERM),
        lambda run: [p.send_signal(signal.SIGUSR1) for p in run.all_processes],
        lambda run: [p.send_signal(signal.SIGTERM) for p in run.all_processes],
        lambda run: [p.send_signal(signal.SIGINT) for p in run.all_processes],
    ]
    done = 0
    for stop in ways:
        # After a save, so that its helper processes get the signals too.
        run = LaunchedRun(config, directory, "checkpoint.every=2", **SECRETS).wait_for_steps(done + 4)
        stop(run)
        assert run.finish() == EXIT_REQUEUE, run.output
        assert "Traceback" not in run.output
        (found,) = re.findall(r"stopped after step (\d+) of 40", run.output)
        assert len(comparable_metrics(directory)) == int(found) > done
        done = int(found)
        assert (directory / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
        ids.add((directory / "wandb.id").read_text())
    run = LaunchedRun(config, directory, **SECRETS)
    assert run.finish() == 0, run.output
    assert f"after step {done}" in run.output
    assert comparable_metrics(directory) == uninterrupted

    parts = sorted(p.name for p in (directory / "wandb").glob("offline-run-*"))
    assert len(parts) == len(ways) + 1
    assert {part.rsplit("-", 1)[1] for part in parts} == {i.strip() for i in ids}
    assert len(ids) == 1

    content = b"".join(p.read_bytes() for p in directory.rglob("*") if p.is_file())
    assert [name for name, secret in SECRETS.items() if secret.encode() in content or secret in run.output] == []


@pytest.mark.slow
def test_a_second_signal_stops_at_once(config: Path, tmp_path: Path) -> None:
    run = LaunchedRun(config, tmp_path / "run").wait_for_steps(2)
    first, second = run.workers
    second.suspend()  # the step's collectives cannot end, so neither can the step
    first.send_signal(signal.SIGTERM)
    time.sleep(6)  # signals within three seconds count as one
    first.send_signal(signal.SIGTERM)
    first.wait(timeout=120)
    second.kill()
    assert run.finish() == EXIT_REQUEUE, run.output
    assert "SIGTERM again: stopping now" in run.output
    assert "stopped after step" not in run.output


def test_a_killed_rank_ends_the_others_with_one_message(config: Path, tmp_path: Path) -> None:
    run = LaunchedRun(config, tmp_path / "run").wait_for_steps(2)
    workers = run.workers
    workers[1].kill()
    assert run.finish() == 128 + signal.SIGKILL
    assert not any(w.is_running() for w in workers)
    assert f"rank 1 (process {workers[1].pid} on" in run.output
    assert run.output.count("exited unexpectedly") <= 1
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_a_rank_without_memory_is_named(config: Path, uninterrupted: list[dict], tmp_path: Path) -> None:
    """Its address space may not grow any further while it trains, and a callback needs more. No rank waits for it, and the run
    continues afterwards.
    """
    directory = tmp_path / "run"
    callback = tmp_path / "grow.py"
    callback.write_text("def grow(result):\n    bytearray(2 << 30)\ngrow.collective = True\n")
    grow = f"logging.callbacks=[{callback}:grow]"
    run = LaunchedRun(config, directory, "checkpoint.every=4", "logging.wandb.mode=disabled", grow)
    run.wait_until((directory / "checkpoints" / "latest").exists)
    workers = run.workers
    limit = workers[1].memory_info().vms
    resource.prlimit(workers[1].pid, resource.RLIMIT_AS, (limit, limit))
    assert run.finish() not in (0, EXIT_REQUEUE, EXIT_USER_ERROR), run.output
    assert not any(w.is_running() for w in workers)
    assert "Traceback" not in run.output
    refused = rf"rank 1 \(process {workers[1].pid} on \S+\) is out of memory: .*of address space \(ulimit -v\)"
    ended = rf"rank 1 \(process {workers[1].pid} on \S+\) exited unexpectedly \(killed, or out of memory"  # by C++ code
    assert len(re.findall(f"{refused}|{ended}", run.output)) == 1, run.output
    again = LaunchedRun(config, directory, "logging.wandb.mode=disabled")
    assert again.finish() == 0, again.output
    assert "resuming from" in again.output and comparable_metrics(directory) == uninterrupted


def test_only_the_first_error_of_a_job_is_shown() -> None:
    """One rank of three fails. The others' collectives break too; those errors are not shown."""
    done = run_python(*torchrun(3), "-m", "tests.support.one_rank_fails")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("Traceback (most recent call last)") == 1, output
    assert "ValueError: rank 2 has had enough" in output


@pytest.mark.slow
def test_the_watchdog_names_a_frozen_rank(config: Path, tmp_path: Path) -> None:
    run = LaunchedRun(config, tmp_path / "run", "run.hang_timeout_s=15").wait_for_steps(2)
    first, frozen = run.workers
    frozen.suspend()
    first.wait(timeout=240)
    frozen.kill()
    assert run.finish() != 0
    assert "no progress for 15 s" in run.output, run.output
    assert re.search(rf"rank 1 \(process {frozen.pid} on \S+\) is not responding \(frozen or gone\)", run.output)
    assert "rank 0 (" not in run.output
    assert "distributed_c10d.py" in (tmp_path / "run" / "logs" / "hang-rank-0.txt").read_text()


@pytest.mark.slow
def test_two_jobs_cannot_write_to_one_run(config: Path, tmp_path: Path) -> None:
    """The second one waits 15 s for the lock, in case a killed job is still ending."""
    long = ("data.max_steps=100000", "data.epochs=100000", "data.quality.mode=none", "checkpoint.every=0")
    first = LaunchedRun(config, tmp_path / "run", *long).wait_for_steps(1)
    second = LaunchedRun(config, tmp_path / "run", *long)
    assert second.finish() == EXIT_USER_ERROR, second.output
    assert "is in use by another job" in second.output
    first.process.send_signal(signal.SIGUSR1)
    assert first.finish() == EXIT_REQUEUE


@pytest.mark.slow
def test_training_survives_a_full_disk(config: Path, uninterrupted: list[dict], tmp_path: Path) -> None:
    """On a small tmpfs in a mount namespace: training continues, and saves again once there is space."""
    found = on_small_disk("tests.support.full_disk_run", config, tmp_path / "small", size="120m")
    assert found["status"] == 0
    assert found["metrics"] == uninterrupted
    assert "the next checkpoint needs" in found["failures"][0]
    assert "Free" in found["failures"][0] and "Training continues" in found["failures"][0]
    assert found["complete_while_full"] == ["step-00000010"]
    assert found["unfinished_while_full"] == []


@pytest.mark.slow
def test_failed_writes_leave_the_last_checkpoint_and_end_the_run(config: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes one rank's write fail within a save; after checkpoint.max_failures in a row the run ends."""
    overrides = [
        "checkpoint.retry_after=2",
        "checkpoint.max_failures=2",
        "checkpoint.keep=1000",
        "logging.wandb.mode=disabled",
        "data.max_steps=4000",
    ]
    checkpoints = tmp_path / "run" / "checkpoints"
    run = LaunchedRun(config, tmp_path / "run", *overrides).wait_until((checkpoints / "latest").exists)
    sizes = CheckpointInfo.read(checkpoints).files
    limit = max(entry["bytes"] for name, entry in sizes.items() if name.startswith("__1_")) // 2
    resource.prlimit(run.workers[1].pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert run.finish() == EXIT_USER_ERROR, run.output
    assert "could not be written" in run.output
    assert re.search("File too large|a limit on file sizes", run.output)  # depends on where in the file the limit is
    assert "This is failure 2 in a row (checkpoint.max_failures)" in run.output
    (good,) = set(re.findall(r"The last good checkpoint is (\S+)\.", run.output))
    assert Path(good).name == (checkpoints / "latest").read_text().strip()
    assert not list(checkpoints.glob("*.partial"))
    failed = events(tmp_path / "run", "save failed")
    assert len(failed) == 1
    assert len(comparable_metrics(tmp_path / "run")) >= failed[0]["step"] + 2


@pytest.mark.slow
def test_a_fault_sweep_of_three_kills_finds_no_fault(tmp_path: Path) -> None:
    """tools/bench/faults.py, which by default kills 50 times. Every second kill also damages a file of the newest checkpoint."""
    options = ("--kills", "3", "--steps", "60", "--damage", "2", "--seed", "4")
    done = run_python("tools/bench/faults.py", *options, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["kills"] == 3
    assert figures["lost steps"] == 0
    assert figures["correct resumes"] == 3 + figures["runs"]
    assert figures["runs like the unbroken one, bit for bit"] == figures["runs"]
