"""Environments that others made: an NGC image's packages stay as they are, IWSFT_PYTHON is used as it is, plotly may be missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT, command_environment

REQUIREMENTS = ROOT / "requirements-container.txt"
# What an NGC PyTorch image has, in the form of its versions, and nothing may replace.
IMAGE = {
    "torch": "2.13.0a0+9186a08b2c.nv26.07",
    "triton": "3.7.1",
    "numpy": "1.26.4",
    "transformer_engine": "2.17.0",
    "flash_attn": "2.7.4.post1+26.07",
    "packaging": "25.0",
}


def required(lines: list[str]) -> dict[str, str]:
    """Package name → the rest of its requirement."""
    found = (re.fullmatch(r"([\w.-]+)(.*?)\s*(?:#.*)?", line.strip()) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def test_the_container_gets_what_the_package_needs_except_what_the_image_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = required(project["dependencies"])
    for in_the_image in ("torch", "numpy", "megatron-core"):
        del wanted[in_the_image]
    assert required(REQUIREMENTS.read_text(encoding="utf-8").splitlines()) == wanted


def test_the_image_installs_this_package_without_dependencies() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert [i for i in installs if "-r requirements-container.txt" in i] and len(installs) == 3
    for install in installs:
        assert "requirements-container.txt" in install or "--no-deps" in install, install
    assert "constraints.txt" not in text and "iwsft doctor" in text


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An environment with the metadata of the image's packages; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True)
    (site,) = (tmp_path / "image" / "lib").glob("python*/site-packages")
    for name, version in IMAGE.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
        (info / "INSTALLER").write_text("pip")
    return tmp_path / "image" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.command
def test_nothing_of_the_image_is_replaced(image: Path, tmp_path: Path) -> None:
    """Asks the package registry what would be installed."""
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(image)),
        *("install", "--dry-run", "--quiet", "--report", str(report), "-r", str(REQUIREMENTS)),
    ]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    if done.returncode and "from versions: none" in done.stderr:
        pytest.skip(f"no package registry can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    installed = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"transformers", "pyarrow", "wandb"} <= installed
    replaced = {name for name in installed if name.replace("-", "_") in IMAGE or name.startswith(("nvidia-", "torch"))}
    assert not replaced and "megatron-core" not in installed


@pytest.mark.slow
@pytest.mark.command
def test_launchers_use_the_environment_they_are_given(tmp_path: Path) -> None:
    script = "set -euo pipefail; source launch/environment.sh; make_environment '[report]'; echo \"python=$python\""

    def with_python(python: str) -> subprocess.CompletedProcess[str]:
        environment = command_environment(IWSFT_PYTHON=python, VENV=str(tmp_path / "venv"))
        return subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, text=True, capture_output=True)

    done = with_python(sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"python={sys.executable}\n" and not (tmp_path / "venv").exists()
    lacking = tmp_path / "python"
    lacking.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    lacking.chmod(0o755)
    done = with_python(str(lacking))
    assert done.returncode != 0 and "lacks packages that are needed" in done.stderr and "No module named" in done.stderr
    assert "must be an interpreter" in with_python("/nowhere/python").stderr


@pytest.mark.command
def test_an_active_environment_with_the_package_is_used_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own environment"
    (own / "bin").mkdir(parents=True)
    for name in ("python", "iwsft"):
        (own / "bin" / name).symlink_to("/bin/true")
    script = 'set -euo pipefail; source launch/environment.sh; make_environment; echo "python=$python"'
    environment = command_environment(VIRTUAL_ENV=str(own))
    environment = {k: v for k, v in environment.items() if k not in ("IWSFT_PYTHON", "VENV", "CONDA_PREFIX")}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"python={own}/bin/python\n"), done.stderr


@pytest.mark.command
@pytest.mark.parametrize("status", [0, 1])
def test_what_takes_long_in_an_installation_is_shown(status: int, tmp_path: Path) -> None:
    """Of a pip that installs nothing."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    said = r"Collecting torch\n  Downloading torch.whl (888.1 MB)\n  Downloading six.whl (12 kB)\nInstalling collected packages: torch\n"
    python.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {status}\n")
    python.chmod(0o755)
    script = "set -euo pipefail; source launch/environment.sh; make_environment '[report]'; echo installed"
    environment = command_environment(VENV=str(tmp_path / "venv"), IWSFT_PYTHON="")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (done.returncode == 0) == (status == 0), done.stderr
    shown = done.stdout.splitlines()[1:3]
    assert shown == ["  downloading torch.whl (888.1 MB)", "  unpacking, a minute or two"]
    assert ("installed" in done.stdout.splitlines()) == (status == 0)
    assert ("installation failed" in done.stderr) == (status == 1)


@pytest.mark.command
def test_transformer_engine_is_built_against_the_torch_that_is_installed(tmp_path: Path) -> None:
    """By a Python that has none, and whose pip only says what it was asked for."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *find_spec*) exit 1 ;;
  "-m pip "*) printf '%s\\n' "$@" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    script = f"set -euo pipefail; source launch/environment.sh; python={python}; add_transformer_engine"
    environment = {k: v for k, v in command_environment().items() if k != "IWSFT_PYTHON"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert done.stdout.splitlines()[-2:] == ["--no-build-isolation", requirement]


@pytest.mark.command
def test_a_report_without_plotly_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "plotly.py").write_text("raise ModuleNotFoundError('none', name='plotly')\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = command_environment()
    environment["PYTHONPATH"] = path + os.pathsep + environment["PYTHONPATH"]
    command = [sys.executable, "-m", "megatron_iwsft", "report", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "charts need plotly" in done.stderr and "[report]" in done.stderr
