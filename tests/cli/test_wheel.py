"""The wheel is complete: installed alone, outside the checkout, every command starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_iwsft.cli.main import COMMANDS
from megatron_iwsft.version import __version__
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.command]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what it is made of, so that no earlier build directory gets into it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "megatron_iwsft", source / "megatron_iwsft", ignore=shutil.ignore_patterns("__pycache__"))
    pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(source)])
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip(["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


def pip(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with `command`, in an empty directory, with the installed wheel first on the path."""
    directory = installed.with_name("elsewhere")
    directory.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(installed)},
        text=True,
        capture_output=True,
    )


def test_the_wheel_has_every_module_and_the_command(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "megatron_iwsft"
    files = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert files <= names
    metadata = f"megatron_iwsft-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"megatron_iwsft", metadata}
    entry_points = zipfile.ZipFile(wheel).read(f"{metadata}/entry_points.txt").decode()
    assert entry_points.split() == ["[console_scripts]", "iwsft", "=", "megatron_iwsft.cli.main:main"]


def test_the_installed_package_is_the_one_that_runs(installed: Path) -> None:
    done = run(installed, "-c", "import megatron_iwsft; print(megatron_iwsft.__file__)")
    assert Path(done.stdout.strip()).parent == installed / "megatron_iwsft"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["config"],
        ["config", "--field", "data.packing"],
        *([name, "--help"] for name in COMMANDS),
    ],
    ids=" ".join,
)
def test_a_command_starts_outside_the_checkout(arguments: list[str], installed: Path) -> None:
    done = run(installed, "-m", "megatron_iwsft", *arguments)
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr


def test_the_console_script_runs(installed: Path) -> None:
    done = run(installed, str(installed / "bin" / "iwsft"), "--version")
    assert done.stdout == f"megatron-iwsft {__version__}\n", done.stderr


def test_a_corpus_can_be_made_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Through worker processes, which import the package anew."""
    records, tokenizer, corpus = (str(tmp_path / name) for name in ("records.jsonl", "tokenizer", "corpus"))
    fields = ("--field", "prompt", "--field", "response", "--vocab-size", "300")
    for arguments in (
        ("make-arithmetic", "--output", records, "--count", "50"),
        ("train-tokenizer", records, "--output", tokenizer, *fields),
        ("shard", records, "--output", corpus, "--tokenizer", tokenizer, "--score-field", "score", "--workers", "2"),
        ("inspect", corpus, "--verify"),
    ):
        done = run(installed, "-m", "megatron_iwsft", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
