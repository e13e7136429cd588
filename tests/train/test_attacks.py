"""What happens around a run from outside: signals at bad moments, strangers on the network, full disks, removed files."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_iwsft.distributed.watchdog import Peer
from megatron_iwsft.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_iwsft.testing import comparable_metrics
from tests.support import ROOT, command_environment, events, tiny
from tests.support.launched_runs import LaunchedRun, write_config

pytestmark = [pytest.mark.parallel, pytest.mark.command]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), data={"max_steps": 6}, checkpoint={"every": 3})


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_signal_at_any_moment_of_the_start(config: Path, tmp_path: Path, delay_s: float, number: int) -> None:
    command = ["env", "--block-signal=USR1,TERM", sys.executable, "-m", "megatron_iwsft.distributed.torchrun"]
    command += ["--nproc_per_node", "2", "-m", "megatron_iwsft", "train", "--config", str(config)]
    command += [f"run.dir={tmp_path}", "data.max_steps=100000"]
    run = subprocess.Popen(
        command, cwd=ROOT, env=command_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    time.sleep(delay_s)
    run.send_signal(number)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == EXIT_REQUEUE, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_local_run_listens_on_the_loopback_interface_only(config: Path, tmp_path: Path) -> None:
    run = LaunchedRun(config, tmp_path / "run", "data.max_steps=100000").wait_for_steps(1)
    processes = [psutil.Process(run.process.pid), *run.workers]
    listeners = {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == EXIT_REQUEUE, run.output
    assert listeners == {"127.0.0.1"}


@pytest.mark.slow
def test_a_failed_export_costs_nothing_but_the_export_which_a_restart_writes(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").write_text("in the way")
    run = LaunchedRun(config, tmp_path / "run", "export.every=2", "export.at_end=true")
    assert run.finish() == EXIT_USER_ERROR, run.output
    assert "Traceback" not in run.output
    assert len(comparable_metrics(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert [event["step"] for event in events(tmp_path / "run", "failed")] == [2, 4, 6]
    assert "training is finished and saved" in run.output
    (tmp_path / "run" / "hf").unlink()
    again = LaunchedRun(config, tmp_path / "run", "export.every=2", "export.at_end=true")
    assert again.finish() == 0, again.output
    assert [directory.name for directory in (tmp_path / "run" / "hf").iterdir()] == ["step-00000006"]
    assert len(comparable_metrics(tmp_path / "run")) == 6, "it trains no further step"


@pytest.mark.slow
def test_a_removed_lock_file_lets_no_second_job_in(config: Path, tmp_path: Path) -> None:
    first = LaunchedRun(config, tmp_path / "run", "data.max_steps=100000").wait_for_steps(1)
    (tmp_path / "run" / ".lock").unlink()
    with first.suspended():  # it has the lock, and leaves the cores to the second
        second = LaunchedRun(config, tmp_path / "run")
        assert second.finish() == EXIT_USER_ERROR
    assert "is in use by another job" in second.output
    first.process.send_signal(signal.SIGTERM)
    assert first.finish() == EXIT_REQUEUE, first.output


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> LaunchedRun:
    """A run whose directory held links to a file outside, and whose temporary directory has a long name."""
    directory = tmp_path_factory.mktemp("finished")
    (directory / "precious").write_text("somebody else's file")
    (directory / "run").mkdir()
    for name in (".lock", "metrics.jsonl", "config.yaml"):
        (directory / "run" / name).symlink_to(directory / "precious")
    long = directory / ("t" * 100)
    long.mkdir()
    run = LaunchedRun(config, directory / "run", TMPDIR=str(long))
    assert run.finish() == 0, run.output
    return run


@pytest.mark.slow
def test_links_in_the_run_directory_are_not_followed(finished: LaunchedRun) -> None:
    assert (finished.directory.parent / "precious").read_text() == "somebody else's file"


@pytest.mark.slow
def test_sockets_have_short_names_in_a_long_temporary_directory(finished: LaunchedRun) -> None:
    assert events(finished.directory, "save failed") == []


@pytest.mark.slow
def test_fewer_steps_than_are_done(config: Path, finished: LaunchedRun) -> None:
    again = LaunchedRun(config, finished.directory, "data.max_steps=2")
    assert again.finish() == 0, again.output
    assert "Nothing to train: the run's end is step 2." in again.output
    (named,) = [line.split("Checkpoint: ")[1] for line in again.output.splitlines() if "Checkpoint: " in line]
    assert Path(named).is_dir()


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, model={"config": tiny.model_config(initializer_range=1e39)})
    run = LaunchedRun(config, tmp_path / "run")
    assert run.finish() == EXIT_USER_ERROR, run.output
    assert "contains values that are not finite" in run.output


@pytest.mark.slow
def test_a_step_that_would_train_nothing_is_refused(tmp_path: Path) -> None:
    """Also where the corpus is not checked."""
    config = write_config(tmp_path, data={"verify": "none"})
    masks = tmp_path / "corpus" / "shard-00000.mask.bin"
    masks.write_bytes(bytes(masks.stat().st_size))
    run = LaunchedRun(config, tmp_path / "run")
    assert run.finish() == EXIT_USER_ERROR, run.output
    assert "DataError: step 1 would train no token" in run.output


def test_liveness_does_not_depend_on_the_clock() -> None:
    """Start times are clock ticks since boot: Linux counts them without the wall clock."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer(1, "host", "place", child.pid, Peer.own(0).started)
    assert Peer.own(0).alive()
    assert not peer.alive(), "another process that has got the same number"
    child.communicate(b"\n")
