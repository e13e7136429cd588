"""Checkpoints on disk: which are kept, how damage is detected, and whose pickles are read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.integrity import TRUSTED_USERS
from megatron_iwsft.checkpoint.load import load
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.summary import describe
from megatron_iwsft.checkpoint.tensors import CheckpointTensors
from megatron_iwsft.checkpoint.writer import CheckpointWriter, Saved
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.testing import run_distributed
from tests.support import STRANGER, run_python, tiny

pytestmark = pytest.mark.parallel

KINDS = ("missing", "truncated", "bit-flipped")


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


class Counter:
    """A host state that is one number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state(self) -> dict:
        return {"step": self.step}

    def load_state(self, state: dict) -> None:
        self.step = state["step"]


def write_and_load(platform, tmp: Path) -> dict[str, str]:
    """Save steps 1 to 6; then damage one file of a copy of the last, in each way, and load it. Returns the errors."""
    parallel = platform.parallel(tensor=2)
    architecture = Architecture.from_hf(tiny.model_config(num_hidden_layers=1), where="test")
    chunks = build_model(architecture, parallel, platform, ModelSettings(dtype=torch.float32))
    load_weights(chunks, RandomInit(architecture, 0), parallel)
    saved: list[Saved] = []
    writer = CheckpointWriter(
        tmp / "run" / "checkpoints", architecture, layout=parallel.layout, keep=2, keep_every=3, on_saved=saved.append
    )
    for step in range(1, 7):
        writer.asynchronous = step % 2 == 0
        writer.save(TrainState(chunks, host={"counter": Counter(step)}, step=step))
        writer.wait()
    assert [s.step for s in saved] == [1, 2, 3, 4, 5, 6]
    last = tmp / "run" / "checkpoints" / "step-00000006"
    errors = {}
    for file in sorted(CheckpointInfo.read(last).files):
        for kind in KINDS:
            copy = tmp / f"{file.strip('.')}-{kind}"
            if platform.rank == 0:
                shutil.copytree(last, copy)
                damage(copy / file, kind)
            torch.distributed.barrier()
            try:
                load(CheckpointInfo.read(copy), TrainState(chunks))
                errors[f"{file} {kind}"] = "loaded"
            except CheckpointError as error:
                errors[f"{file} {kind}"] = str(error)
    load(CheckpointInfo.read(last), TrainState(chunks))
    return errors


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, str], dict[str, str]]:
    tmp = tmp_path_factory.mktemp("checkpoints")
    first, second = run_distributed(write_and_load, 2, tmp)
    return tmp, first, second


def test_every_damaged_file_is_detected_and_named_on_all_ranks(written) -> None:
    _, first, second = written
    assert first == second
    assert len(first) >= 4 * len(KINDS)
    for case, error in first.items():
        file, kind = case.rsplit(" ", 1)
        expected = {"missing": "is missing", "truncated": "is truncated", "bit-flipped": "is damaged: its checksum"}[
            kind
        ]
        assert file in error and expected in error, (case, error)


def test_the_newest_and_every_third_are_kept(written) -> None:
    root = written[0] / "run" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000003", "step-00000005", "step-00000006"]
    assert CheckpointInfo.read(root).step == 6
    assert CheckpointInfo.read(root).host == {"counter": {"step": 6}}


def test_a_changed_info_file_is_detected(written, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written[0] / "run" / "checkpoints" / "step-00000006", tmp_path / "copy"))
    info = copy / "iwsft.json"
    info.write_text(info.read_text().replace('"step": 6', '"step": 7', 1))
    with pytest.raises(CheckpointError, match=r"iwsft\.json is damaged: its checksum"):
        CheckpointInfo.read(copy)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_tensor_checks_its_file(written, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(written[0] / "run" / "checkpoints" / "step-00000006", tmp_path / "copy"))
    name = "embedding.word_embeddings.weight"
    CheckpointTensors(copy).read(name)
    for file in copy.glob("*.distcp"):
        damage(file, kind)
    with pytest.raises(CheckpointError, match=r"\.distcp is (missing|truncated|damaged)"):
        CheckpointTensors(copy).read(name)
    damage(copy / ".metadata", kind)
    with pytest.raises(CheckpointError, match=r"\.metadata is (missing|truncated|damaged)"):
        CheckpointTensors(copy)


def test_pickles_of_other_users_are_not_read(written, tmp_path: Path, monkeypatch) -> None:
    copy = Path(shutil.copytree(written[0] / "run" / "checkpoints" / "step-00000006", tmp_path / "copy"))
    (copy / ".metadata").chmod(0o666)
    with pytest.raises(CheckpointError, match="can be written by every user"):
        CheckpointTensors(copy)
    (copy / ".metadata").chmod(0o600)
    CheckpointTensors(copy)
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(copy / ".metadata", STRANGER, STRANGER)
    with pytest.raises(CheckpointError, match=rf"belongs to {STRANGER}.*IWSFT_TRUSTED_USERS={STRANGER}"):
        CheckpointTensors(copy)
    monkeypatch.setenv(TRUSTED_USERS, f"nobody,{STRANGER}")
    CheckpointTensors(copy)
    monkeypatch.setenv(TRUSTED_USERS, "no-such-user")
    with pytest.raises(CheckpointError, match="names no-such-user"):
        CheckpointTensors(copy)


@pytest.mark.command
def test_inspection_reports_damaged_checkpoints(written, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(written[0] / "run", tmp_path / "run"))
    text, healthy = describe(copy, verify=True)
    assert healthy
    assert "step          6" in text and "TP 2" in text and "all checksums match" in text
    damage(next((copy / "checkpoints" / "step-00000005").glob("*.distcp")), "bit-flipped")
    assert describe(copy, verify=False)[1], "sizes are unchanged"
    text, healthy = describe(copy, verify=True)
    assert not healthy
    assert "step-00000005: 0.000 GB, DAMAGED, 1 files" in text
    done = run_python("tools/inspect_checkpoint.py", copy, "--verify")
    assert done.returncode == 1 and done.stdout.strip() == text.strip()


@pytest.mark.parametrize(
    "files",
    [(".metadata", "metadata.json", "common.pt"), ("latest_checkpointed_iteration.txt",), ("latest_train_state.pt",)],
)
def test_a_checkpoint_of_another_megatron_program_is_refused_by_name(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("10")
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint of another Megatron-Core program.*iwsft import --megatron"
    ):
        CheckpointInfo.read(tmp_path)
