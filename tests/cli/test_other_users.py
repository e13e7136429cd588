"""Users who are not root, on files that belong to others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, STRANGER, command_environment, run_python
from tests.support.launched_runs import write_config

ALICE, BOB = STRANGER, STRANGER + 1
# Bob may read every file, so that he can start this Python wherever it is installed; he may write only his own.
AS_BOB = ["setpriv", f"--reuid={BOB}", f"--regid={BOB}", "--clear-groups"]
AS_BOB += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def can_be_bob() -> bool:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*AS_BOB, "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.command,
    pytest.mark.skipif(not can_be_bob(), reason="needs setpriv, and root to become another user"),
]


def iwsft_as_bob(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*AS_BOB, sys.executable, "-m", "megatron_iwsft", *map(str, arguments)],
        cwd=ROOT,
        env=command_environment(HOME=str(home), USER="bob", PYTHONDONTWRITEBYTECODE="1", **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def own(directory: Path, user: int) -> Path:
    for path in (directory, *directory.rglob("*")):
        os.lchown(path, user, user)
    return directory


@pytest.fixture(scope="module")
def alice(tmp_path_factory) -> Path:
    """Her corpus, config, and run of two steps."""
    home = tmp_path_factory.mktemp("alice")
    config = write_config(home, data={"max_steps": 2}, checkpoint={"every": 1})
    trained = run_python("-m", "megatron_iwsft", "train", "--config", config)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    return own(home, ALICE)


@pytest.fixture
def bob(tmp_path: Path) -> Path:
    return own(tmp_path, BOB)


@pytest.mark.slow
def test_a_checkpoint_of_an_untrusted_user_is_not_loaded(alice: Path, bob: Path) -> None:
    export = ("export", "--checkpoint", alice / "run", "--output", bob / "hf")
    refused = iwsft_as_bob(bob, *export)
    assert refused.returncode == 2
    assert f"belongs to {ALICE}" in refused.stderr and f"IWSFT_TRUSTED_USERS={ALICE}" in refused.stderr
    assert not (bob / "hf").exists()
    trusted = iwsft_as_bob(bob, *export, IWSFT_TRUSTED_USERS=str(ALICE))
    assert trusted.returncode == 0, trusted.stderr
    assert (bob / "hf" / "config.json").stat().st_uid == BOB


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "reference", "report", "shard"])
def test_nothing_is_written_among_the_files_of_others(command: str, alice: Path, bob: Path) -> None:
    before = sorted(alice.rglob("*"))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "train": ("--config", alice / "config.yaml"),
        "reference": ("--config", alice / "config.yaml", "objective.name=iw_sft"),
        "report": (alice / "run",),
        "shard": (alice / "records.jsonl", "--output", alice / "more", "--tokenizer", alice / "tokenizer"),
    }
    done = iwsft_as_bob(bob, command, *arguments[command])
    assert done.returncode == 2 and "Permission denied" in done.stderr and str(alice) in done.stderr
    assert sorted(alice.rglob("*")) == before


@pytest.mark.slow
def test_files_that_others_have_put_into_a_run(alice: Path, bob: Path) -> None:
    """A log of another user, and a checkpoint, which is skipped."""
    shutil.copytree(alice / "run", bob / "run")
    own(bob / "run", BOB)
    own(bob / "run" / "checkpoints" / "step-00000002", ALICE)
    (bob / "run").chmod(0o777)
    os.lchown(bob / "run" / "metrics.jsonl", ALICE, ALICE)
    done = iwsft_as_bob(bob, "train", "--config", alice / "config.yaml", f"run.dir={bob / 'run'}", "data.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert f"skipping a checkpoint: {bob / 'run' / 'checkpoints' / 'step-00000002'} belongs to {ALICE}" in done.stdout
    assert [line[:10] for line in (bob / "run" / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {k}' for k in (1, 2, 3)
    ]
