"""`iwsft` in hostile surroundings: closed or full outputs, other locales, signals, launch variables, links in the run directory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_iwsft.distributed.torchrun import unresolved
from megatron_iwsft.errors import EXIT_REQUEUE, ConfigError
from megatron_iwsft.utils.launch import check_launch_environment
from tests.support import ROOT, command_environment
from tests.support.launched_runs import write_config
from tests.support.malformed_commands import VALID

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
IWSFT = f"{sys.executable} -m megatron_iwsft"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=command_environment(**environment),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    run = tmp_path / "Läufe" / "zwölf"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    return run


@pytest.mark.command
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(closed: str, run_directory: Path) -> None:
    done = shell(f"{IWSFT} report {run_directory} {closed}")
    page = (run_directory / "report.html").read_text(encoding="utf-8")
    assert done.returncode == 0
    assert page.startswith("<!doctype html>") and page.count('class="plot"') == 1
    assert "wrote" not in page
    assert shell(f"{IWSFT} report /nowhere {closed}").returncode == 2


@pytest.mark.command
def test_a_full_output(run_directory: Path) -> None:
    done = shell(f"{IWSFT} report {run_directory} >/dev/full")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "[Errno 28] No space left on device. Check the path, its permissions and the disk's space.",
    )
    assert shell(f"{IWSFT} report /nowhere >/dev/full 2>/dev/full").returncode == 2


@pytest.mark.command
@pytest.mark.parametrize("command", ["config", "--help", "report --help"])
def test_a_reader_that_leaves(command: str) -> None:
    """Also when the output is smaller than a pipe's buffer."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_iwsft", *command.split()],
        cwd=ROOT,
        env=command_environment(),
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == (0 if command == "report --help" else 141)  # argparse ignores the error


@pytest.mark.slow
@pytest.mark.command
def test_the_c_locale(run_directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(VALID | {"run": {"name": "→ é", "dir": str(run_directory)}}))
    plain, printed = (shell(f"{IWSFT} config --get run.dir {config}", **e) for e in ({}, C_LOCALE))
    assert plain.stdout == printed.stdout == f"{run_directory}\n"
    assert "→ é" in shell(f"{IWSFT} config {config}", **C_LOCALE).stdout
    assert shell(f"{IWSFT} report {run_directory}", **C_LOCALE).returncode == 0
    # Up to torch 2.13 it reads files of its own in the locale's encoding.
    done = shell(f"{IWSFT} import --model {tmp_path} --output {tmp_path}/imported", **C_LOCALE)
    assert done.returncode == 2
    assert "Set PYTHONUTF8=1" in done.stderr or "it has no config.json" in done.stderr, done.stderr


@pytest.mark.command
@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_without_assertions_and_docstrings(option: str, run_directory: Path) -> None:
    iwsft = f"{sys.executable} {option} -m megatron_iwsft"
    assert shell(f"{iwsft} report --help").returncode == 0
    assert shell(f"{iwsft} config --field data.packing").returncode == 0
    assert shell(f"{iwsft} report {run_directory}").returncode == 0
    assert shell(f"{iwsft} report /nowhere").returncode == 2


INTERRUPTED = """
import time
from megatron_iwsft.utils.cli import run_command

def main():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep({cleanup})

run_command(main)
"""


@pytest.mark.command
@pytest.mark.parametrize("times", [1, 2])
def test_interrupts(times: int) -> None:
    """The first ends the command after its cleanup, the second at once."""
    # What a shell starts in the background ignores SIGINT, and so do the tests' processes then.
    script = INTERRUPTED.format(cleanup=60 if times == 2 else 0.1)
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{default}\n{script}"],
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    if times == 2:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


def _job(**variables: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "LOCAL_RANK": "0", "RANK": "0"} | variables


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE is 4 .* but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', which is not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', which is not a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', which is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1"),
        (_job(WORLD_SIZE="2", RANK="2"), "RANK is 2 and WORLD_SIZE is 2"),
        (_job(WORLD_SIZE="2", MASTER_PORT="http"), "MASTER_PORT is 'http', which is not a port"),
        (_job(WORLD_SIZE="2", MASTER_PORT="65536"), "MASTER_PORT is '65536', which is not a port"),
    ],
)
def test_launch_variables_that_describe_no_job(variables: dict[str, str], message: str, monkeypatch) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(ConfigError, match=message):
        check_launch_environment()


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1"}, _job(WORLD_SIZE="2", RANK="1", MASTER_PORT="1")])
def test_launch_variables_that_describe_a_job(variables: dict[str, str], monkeypatch) -> None:
    _set(monkeypatch, variables)
    check_launch_environment()


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_port_that_is_in_use(world: str, monkeypatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        _set(monkeypatch, _job(WORLD_SIZE=world, MASTER_PORT=str(other.getsockname()[1])))
        with pytest.raises(ConfigError, match=r"cannot use MASTER_PORT \d+: Address already in use"):
            check_launch_environment()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun may listen there itself
        check_launch_environment()


@pytest.mark.command
def test_two_nodes_cannot_meet_at_a_port_that_is_in_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        torchrun = f"{sys.executable} -m megatron_iwsft.distributed.torchrun --nnodes 2 --node_rank 0"
        done = shell(f"{torchrun} --master_addr 127.0.0.1 --master_port {port} -m megatron_iwsft train")
    assert done.returncode == 2
    assert f"the nodes cannot meet at 127.0.0.1:{port}" in done.stderr and "in use" in done.stderr


@pytest.mark.slow
@pytest.mark.command
def test_a_stop_signal_while_the_first_node_is_awaited() -> None:
    with socket.socket() as other:
        other.bind(("", 0))  # and nobody listens
        command = [sys.executable, "-m", "megatron_iwsft.distributed.torchrun", "--nnodes", "2", "--node_rank", "1"]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(other.getsockname()[1])]
        waiting = subprocess.Popen([*command, "-m", "megatron_iwsft", "train"], cwd=ROOT, env=command_environment())
        time.sleep(15)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(timeout=60) == EXIT_REQUEUE


def test_the_first_node_has_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unresolved("127.0.0.1") is None and unresolved("[::1]") is None and unresolved("localhost") is None

    def broken(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", broken)
    said = unresolved("node-1", patience_s=0)
    assert said is not None and "cannot meet at node-1" in said and "(Name or service not known)" in said


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.command
def test_one_of_four_processes_does_not_wait_for_the_others(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(VALID))
    for command in ("train", "reference"):
        began = time.monotonic()
        done = shell(f"{IWSFT} {command} --config {config}", WORLD_SIZE="4")
        assert done.returncode == 2 and "Start the command under torchrun" in done.stderr
        assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.command
def test_a_run_in_a_directory_full_of_planted_links(tmp_path: Path) -> None:
    """World-writable, in the locale C, without assertions, on a full output: training neither follows a link nor stores a secret,
    and goes on to its end.
    """
    config, run, victim = write_config(tmp_path, data={"max_steps": 2}), tmp_path / "run", tmp_path / "victim"
    victim.write_text("precious")
    for name in ("metrics.jsonl", "config.yaml", "wandb.id", "logs/events.jsonl", "checkpoints/latest"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(victim)
    run.chmod(0o777)
    secrets = {"WANDB_API_KEY": "a" * 40, "HF_TOKEN": "hf_" + "b" * 30}
    iwsft = f"{sys.executable} -O -m megatron_iwsft"
    done = shell(f"{iwsft} train --config {config} logging.wandb.mode=offline >/dev/full", LC_ALL="C", **secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "logs" / "events.jsonl").read_text().splitlines()[-1])["event"] == "finished"
    assert victim.read_text() == "precious"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert not [p for p in run.rglob("*") if p.is_symlink() and "damaged" not in p.name and p.resolve() == victim]
    content = b"".join(p.read_bytes() for p in run.rglob("*") if p.is_file())
    assert not [secret for secret in secrets.values() if secret.encode() in content]
