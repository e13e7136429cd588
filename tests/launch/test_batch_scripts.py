"""Which Python the batch scripts use, with stand-ins for Slurm's commands; tests/slurm runs them on a real one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment

pytestmark = pytest.mark.command

SCRIPTS = {
    "train.sbatch": ["config.yaml"],
    "precompute_reference.sbatch": ["config.yaml"],
    "convert.sbatch": ["export"],
    "evaluate.sbatch": ["--run", "run"],
    "shard_corpus.sbatch": ["records.jsonl"],
    "tool.sbatch": ["doctor"],
}


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """An environment with Slurm's commands, and a Python that writes its arguments to the file `asked` and answers with a directory."""
    programs = {
        "scontrol": 'case "$*" in *hostnames*) echo node1 ;; *) echo "   Command=$SCRIPT" ;; esac',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "sbatch": "echo 7",
        "own python": 'printf "%s\\n" "$*" >>"$ASKED"; case "$*" in *--null*) printf "run\\0corpus\\0true\\0" ;; *) echo "$RUN" ;; esac',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = command_environment(
        IWSFT_PYTHON=str(tmp_path / "own python"),
        IWSFT_VENV="/nowhere",
        IWSFT_ROOT=str(ROOT),
        ASKED=str(tmp_path / "asked"),
        RUN=str(tmp_path / "run"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node1",
        SLURM_JOB_NUM_NODES="1",
    )
    return environment | {"PATH": f"{tmp_path}:{environment['PATH']}"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_script_uses_the_python_it_is_given(script: str, commands: dict[str, str], tmp_path: Path) -> None:
    environment = commands | {"SCRIPT": str(ROOT / "slurm" / script)}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / script, *SCRIPTS[script]],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = (tmp_path / "asked").read_text().splitlines()[-1]
    assert SCRIPTS[script][0] in last and ("torchrun" in last) == ("config.yaml" in last)


def test_the_pipeline_asks_the_python_it_is_given_for_the_config(commands: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "pipeline.sh", "--config", "config.yaml"],
        cwd=tmp_path,
        env=commands,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["reference: job 7", "train: job 7", "export: job 7"]
    assert "config --null" in (tmp_path / "asked").read_text()
