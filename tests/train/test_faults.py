"""Runs that are stopped, killed, frozen, or run out of disk: what they say, what they leave, and how they go on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_iwsft.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_iwsft.testing import comparable_metrics as metrics
from tests.support import ROOT
from tests.support.interrupt import Run, events, write_config

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), logging={"wandb": {"mode": "offline"}})


@pytest.fixture(scope="module")
def unbroken(config: Path) -> list[dict]:
    run = Run(config, config.parent / "unbroken", "logging.wandb.mode=disabled")
    assert run.finish() == 0, run.output
    return metrics(run.directory)


SECRETS = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "hf_" + "b" * 30, "AWS_SECRET_ACCESS_KEY": "c" * 40}


def test_stopped_again_and_again_it_ends_as_if_unbroken(config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    """By a signal to torchrun, to one worker, and to all processes at once as Slurm does; with wandb, whose id it keeps."""
    run_dir, ids = tmp_path / "run", set()
    ways = [
        lambda run: run.process.send_signal(signal.SIGUSR1),
        lambda run: run.workers[1].send_signal(signal.SIGTERM),
        lambda run: [p.send_signal(signal.SIGUSR1) for p in whole_tree(run)],
        lambda run: [p.send_signal(signal.SIGTERM) for p in whole_tree(run)],
    ]
    done = 0
    for stop in ways:
        # After a save: its helper processes get the signals too.
        run = Run(config, run_dir, "checkpoint.every=2", env=SECRETS).steps(done + 4)
        stop(run)
        assert run.finish() == EXIT_REQUEUE, run.output
        assert "Traceback" not in run.output
        (found,) = re.findall(r"stopped after step (\d+) of 40", run.output)
        assert len(metrics(run_dir)) == int(found) > done
        done = int(found)
        assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{done:08d}"
        ids.add((run_dir / "wandb.id").read_text())
    run = Run(config, run_dir, env=SECRETS)
    assert run.finish() == 0, run.output
    assert f"after step {done}" in run.output
    assert metrics(run_dir) == unbroken
    parts = sorted(p.name for p in (run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == len(ways) + 1
    assert {part.rsplit("-", 1)[1] for part in parts} == {i.strip() for i in ids}
    assert len(ids) == 1
    content = b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    assert [name for name, secret in SECRETS.items() if secret.encode() in content or secret in run.output] == []


def whole_tree(run: Run) -> list[psutil.Process]:
    top = psutil.Process(run.process.pid)
    return [top, *top.children(recursive=True)]


def test_a_second_signal_stops_at_once(config: Path, tmp_path: Path) -> None:
    # A frozen peer: the collective that the step needs will not end, so neither will the step.
    run = Run(config, tmp_path / "run").steps(2)
    first, second = run.workers
    second.suspend()
    first.send_signal(signal.SIGTERM)
    time.sleep(4)  # signals within three seconds count as one
    first.send_signal(signal.SIGTERM)
    first.wait(timeout=30)
    second.kill()
    assert run.finish() == EXIT_REQUEUE, run.output
    assert "SIGTERM again: stopping now" in run.output
    assert "stopped after step" not in run.output


def test_a_killed_rank_takes_the_others_along_with_one_message(config: Path, tmp_path: Path) -> None:
    run = Run(config, tmp_path / "run").steps(2)
    workers = run.workers
    workers[1].kill()
    assert run.finish() == 128 + signal.SIGKILL
    assert not any(w.is_running() for w in workers)
    assert f"rank 1 (process {workers[1].pid} on" in run.output
    assert run.output.count("exited unexpectedly") <= 1
    assert "Traceback" not in run.output


def test_the_first_error_is_shown_once() -> None:
    """One rank of three fails; what the others' broken collectives say is not shown."""
    command = [
        sys.executable,
        "-m",
        "megatron_iwsft.distributed.torchrun",
        "--nproc_per_node",
        "3",
        "-m",
        "tests.support.one_fails",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("Traceback (most recent call last)") == 1, output
    assert "ValueError: rank 2 has had enough" in output


def test_a_frozen_rank_is_named_when_time_is_up(config: Path, tmp_path: Path) -> None:
    run = Run(config, tmp_path / "run", "run.hang_timeout_s=6").steps(2)
    first, frozen = run.workers
    frozen.suspend()
    first.wait(timeout=120)
    frozen.kill()
    assert run.finish() != 0
    assert "no progress for 6 s" in run.output, run.output
    assert re.search(rf"rank 1 \(process {frozen.pid} on \S+\) is not responding \(frozen or gone\)", run.output)
    assert "rank 0 (" not in run.output
    assert "distributed_c10d.py" in (tmp_path / "run" / "logs" / "hang-rank-0.txt").read_text()


def test_two_jobs_do_not_write_to_one_run(config: Path, tmp_path: Path) -> None:
    long = ("data.max_steps=100000", "data.epochs=100000", "data.quality.mode=none", "checkpoint.every=0")
    first = Run(config, tmp_path / "run", *long).steps(1)
    second = Run(config, tmp_path / "run", *long)
    assert second.finish() == EXIT_USER_ERROR, second.output
    assert "is in use by another job" in second.output
    first.process.send_signal(signal.SIGUSR1)
    assert first.finish() == EXIT_REQUEUE


def test_a_full_disk(config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    """On a small tmpfs of a mount namespace: training goes on, and catches up when there is room again."""
    mount = tmp_path / "small"
    mount.mkdir()
    script = f"mount -t tmpfs -o size=120m tmpfs {mount} && exec {sys.executable} -m tests.support.full_disk {config} {mount}"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=400,
    )
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0
    assert found["metrics"] == unbroken
    assert "the next checkpoint needs" in found["failures"][0]
    assert "Free" in found["failures"][0] and "Training continues" in found["failures"][0]
    assert found["whole_while_full"] == ["step-00000010"]


def test_a_failed_write_leaves_the_last_checkpoint(config: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes one rank's write fail within a save; after checkpoint.max_failures in a row the run ends."""
    overrides = [
        "checkpoint.retry_after=2",
        "checkpoint.max_failures=2",
        "logging.wandb.mode=disabled",
        "data.max_steps=4000",
    ]
    run = Run(config, tmp_path / "run", *overrides).until((tmp_path / "run" / "checkpoints" / "latest").exists)
    largest = max(p.stat().st_size for p in (tmp_path / "run").rglob("__1_*.distcp"))
    resource.prlimit(run.workers[1].pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    assert run.finish() == EXIT_USER_ERROR, run.output
    assert "could not be written" in run.output
    assert re.search("File too large|a limit on file sizes", run.output)  # by where in the file the limit lies
    assert "This is failure 2 in a row (checkpoint.max_failures)" in run.output
    (good,) = set(re.findall(r"The last good checkpoint is (\S+)\.", run.output))
    assert Path(good).name == (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    failed = events(tmp_path / "run", "save failed")
    assert len(failed) == 1
    assert len(metrics(tmp_path / "run")) >= failed[0]["step"] + 2


def test_a_short_fault_sweep(tmp_path: Path) -> None:
    """The command that does 50; one file of a checkpoint is damaged in between."""
    command = [sys.executable, "tools/bench/faults.py", "--kills", "3", "--steps", "60", "--damage", "2", "--seed", "4"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["kills"] == 3
    assert figures["lost steps"] == 0
    assert figures["correct resumes"] == 3 + figures["runs"]
    assert figures["runs like the unbroken one, bit for bit"] == figures["runs"]
