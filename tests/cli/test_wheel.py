"""Source archive and wheel are complete: the wheel is built from the archive; installed alone, outside the checkout, all commands start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from megatron_iwsft.cli.main import COMMANDS
from megatron_iwsft.version import __version__
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.command]


def named_in_the_readme() -> set[str]:
    """Paths of this repository that the README links to or has in a command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = re.findall(r"\]\(([^)#:]+)[)#]|(?<![\w./-])((?:[\w.-]+/)+[\w.-]+\.\w+)", text)
    paths = {path for pair in words for path in pair if path}
    return {path for path in paths if (ROOT / path).is_file() and not path.startswith(("build/", "runs/", ".venv/"))}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that no earlier build directory gets into it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("archive")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "wandb")
    shutil.copytree(ROOT, source, ignore=skip, dirs_exist_ok=True)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(output.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(archive)])
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


def test_the_archive_has_what_the_readme_names(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    named = named_in_the_readme()
    assert named >= {
        "launch/quickstart.sh",
        "tests/run.sh",
        "tools/bench/logprob.py",
        "slurm/README.md",
        "configs/own-data.yaml",
    }
    assert named | {"README.md", "LICENSE"} <= names
    assert archive.name == f"megatron_iwsft-{__version__}.tar.gz"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


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
