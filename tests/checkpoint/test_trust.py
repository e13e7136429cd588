"""Attacks on those who load a checkpoint: no code runs, nothing that is not the checkpoint's is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_iwsft.checkpoint.info import INFO, CheckpointInfo, complete_checkpoints, info_checksum
from megatron_iwsft.checkpoint.integrity import TRUSTED_GROUPS, file_sum
from megatron_iwsft.checkpoint.load import load
from megatron_iwsft.checkpoint.pickles import read_metadata
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.tensors import CheckpointTensors
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.testing import run_distributed
from tests.support import STRANGER, tiny

pytestmark = pytest.mark.parallel

CODE_RAN = "code-ran"  # the file that an attack leaves when it succeeds


class Attack:
    """Unpickling it creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.system, (f"touch {self.sentinel}",))


def relist(directory: Path) -> None:
    """Give iwsft.json the sums of the files as they are now, as an attacker who knows the format would."""
    info = json.loads((directory / INFO).read_text())
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != INFO]
    info["files"] = {p.relative_to(directory).as_posix(): file_sum(p) for p in files}
    del info["checksum"]
    (directory / INFO).write_text(json.dumps(info | {"checksum": info_checksum(info)}))


def evil_metadata(directory: Path, sentinel: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(Attack(sentinel)))
    relist(directory)


def evil_metadata_by_attribute_path(directory: Path, sentinel: Path) -> None:
    """Protocol 4 resolves dotted names: an allowed module leads to others."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    function = text("torch.distributed.checkpoint.filesystem") + text("os.system") + b"\x93"
    (directory / ".metadata").write_bytes(b"\x80\x04" + function + text(f"touch {sentinel}") + b"\x85R.")
    relist(directory)


def evil_common(directory: Path, sentinel: Path) -> None:
    torch.save({"optimizer": Attack(sentinel)}, directory / "common.pt")
    relist(directory)


def evil_object(directory: Path, sentinel: Path) -> None:
    """An object beside tensors, with the metadata that leads Megatron-Core to it."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    place = next(iter(metadata.storage_data.values()))
    file = directory / place.relative_path
    content = io.BytesIO()
    torch.save(Attack(sentinel), content)
    key = (
        "decoder.layers.0.self_attention.linear_proj._extra_state/shard_0_1"  # which the model asks for if it is there
    )
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = replace(
        place, offset=file.stat().st_size, length=len(content.getvalue())
    )
    file.write_bytes(file.read_bytes() + content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    relist(directory)


def unlisted_metadata(directory: Path, sentinel: Path) -> None:
    evil_metadata(directory, sentinel)
    info = json.loads((directory / INFO).read_text())
    del info["files"][".metadata"], info["checksum"]
    (directory / INFO).write_text(json.dumps(info | {"checksum": info_checksum(info)}))


def link_to_a_secret(directory: Path, sentinel: Path) -> None:
    secret = sentinel.parent / "secret"
    secret.write_text("top secret")
    (directory / "tokenizer").mkdir(exist_ok=True)
    (directory / "tokenizer" / "vocab.json").symlink_to(secret)
    relist(directory)


def name_outside(directory: Path, sentinel: Path) -> None:
    info = json.loads((directory / INFO).read_text())
    info["files"]["../../victim"] = info["files"].pop("metadata.json")
    del info["checksum"]
    (directory / INFO).write_text(json.dumps(info | {"checksum": info_checksum(info)}))


def fifo(directory: Path, sentinel: Path) -> None:
    (directory / "common.pt").unlink(missing_ok=True)
    os.mkfifo(directory / "common.pt")


def info_is_a_directory(directory: Path, sentinel: Path) -> None:
    (directory / INFO).unlink()
    (directory / INFO).mkdir()


def info_of_odd_types(directory: Path, sentinel: Path) -> None:
    info = json.loads((directory / INFO).read_text()) | {"files": ["a"], "step": "6"}
    del info["checksum"]
    (directory / INFO).write_text(json.dumps(info | {"checksum": info_checksum(info)}))


def group_writable(directory: Path, sentinel: Path) -> None:
    (directory / ".metadata").chmod(0o664)
    os.chown(directory / ".metadata", -1, STRANGER)


def sticky_directory(directory: Path, sentinel: Path) -> None:
    directory.chmod(0o1777)


def foreign_info(directory: Path, sentinel: Path) -> None:
    os.chown(directory / INFO, STRANGER, 0)


# attack → what the refusal says
ATTACKS: dict[Callable[[Path, Path], None], str] = {
    evil_metadata: r"\.metadata is not loaded: it refers to (posix|os)\.system",
    evil_metadata_by_attribute_path: r"\.metadata is not loaded: it refers to .*os\.system",
    evil_common: r"common\.pt is not loaded: it does not consist of tensors and plain values only",
    evil_object: r"_extra_state.* is not loaded: it does not consist of tensors and plain values only",
    unlisted_metadata: r"\.metadata is not part of the checkpoint",
    link_to_a_secret: "is a symbolic link",
    name_outside: "is not a file name, or one below",
    fifo: r"common\.pt is not a regular file",
    info_is_a_directory: "holds no complete checkpoint",
    info_of_odd_types: r"iwsft\.json is damaged: (step|files)",
    group_writable: rf"can be written by the group {STRANGER}.*IWSFT_TRUSTED_GROUPS={STRANGER}",
    sticky_directory: "can be written by every user",
    foreign_info: f"belongs to {STRANGER}",
}
NOT_READ_BY_EXPORT = {evil_common, evil_object}
PICKLES = (evil_metadata, evil_metadata_by_attribute_path, evil_common, evil_object)
NEEDS_ROOT = {group_writable, foreign_info}


def save_and_attack(platform: Any, tmp: Path) -> dict[str, str]:
    """What loading says after each attack."""
    parallel = platform.parallel()
    architecture = Architecture.from_hf(tiny.model_config(num_hidden_layers=1), where="test")
    chunks = build_model(architecture, parallel, platform, ModelSettings())
    load_weights(chunks, RandomInit(architecture, 0), parallel)
    tokenizer = sorted(tiny.hf_tokenizer(tmp / "tokenizer").iterdir())
    saved = CheckpointWriter(tmp / "run", architecture, layout=parallel.layout, tokenizer_files=tokenizer).save(
        TrainState(chunks, step=6)
    )
    said = {}
    for attack in ATTACKS:
        if attack in NEEDS_ROOT and os.geteuid() != 0:
            continue
        home = tmp / attack.__name__
        shutil.copytree(saved, home / "step-00000006")
        attack(home / "step-00000006", home / CODE_RAN)
        try:
            load(CheckpointInfo.read(home / "step-00000006"), TrainState(chunks))
            said[attack.__name__] = "loaded"
        except CheckpointError as error:
            said[attack.__name__] = str(error)
    for attack in PICKLES:
        home = tmp / f"{attack.__name__}-after-the-check"
        shutil.copytree(saved, home / "step-00000006")
        attack(home / "step-00000006", home / CODE_RAN)
        # The check has seen another directory; for the evil object, one with a harmless object in its place.
        checked = read_metadata(home / "step-00000006" if attack is evil_object else saved)
        try:
            with mock.patch("megatron_iwsft.checkpoint.load.verify", return_value=checked):
                load(CheckpointInfo.read(home / "step-00000006"), TrainState(chunks))
            said[home.name] = "loaded"
        except CheckpointError as error:
            said[home.name] = str(error)
    return said


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    tmp = tmp_path_factory.mktemp("attacked")
    return tmp, run_distributed(save_and_attack, 1, tmp)[0]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_refused_by_name_and_runs_no_code(
    attacked, attack: Callable[[Path, Path], None], tmp_path
) -> None:
    home, said = attacked
    if attack in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    assert re.search(ATTACKS[attack], said[attack.__name__], re.S), said[attack.__name__]
    # The exporter reads the weights and nothing else, without Megatron-Core.
    if attack not in NOT_READ_BY_EXPORT:
        with pytest.raises(CheckpointError):
            export_checkpoint(home / attack.__name__ / "step-00000006", tmp_path / "hf")
        assert not list(tmp_path.iterdir())
    else:
        export_checkpoint(home / attack.__name__ / "step-00000006", tmp_path / "hf")
    assert not (home / attack.__name__ / CODE_RAN).exists(), "code of the attacker ran"


@pytest.mark.parametrize("attack", PICKLES, ids=lambda attack: attack.__name__)
def test_a_checkpoint_exchanged_after_its_check_runs_no_code(attacked, attack: Callable[[Path, Path], None]) -> None:
    home, said = attacked
    name = f"{attack.__name__}-after-the-check"
    assert not (home / name / CODE_RAN).exists(), "code of the attacker ran"
    if attack is evil_object:
        assert "cannot be loaded" in said[name]
    elif attack is not evil_common:  # which only some lines of Megatron-Core read
        assert said[name] == "loaded", "by the metadata that was checked"


def test_groups_can_be_trusted(attacked, tmp_path: Path, monkeypatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    copy = Path(shutil.copytree(attacked[0] / "run" / "step-00000006", tmp_path / "copy"))
    group_writable(copy, tmp_path / CODE_RAN)
    with pytest.raises(CheckpointError, match=f"can be written by the group {STRANGER}"):
        CheckpointTensors(copy)
    monkeypatch.setenv(TRUSTED_GROUPS, str(STRANGER))
    CheckpointTensors(copy)


def test_what_is_written_under_umask_0_can_be_loaded(tmp_path: Path) -> None:
    said = run_distributed(save_without_umask, 1, tmp_path)[0]
    assert said == "loaded"


def save_without_umask(platform: Any, tmp: Path) -> str:
    os.umask(0)
    parallel = platform.parallel()
    architecture = Architecture.from_hf(tiny.model_config(num_hidden_layers=1), where="test")
    chunks = build_model(architecture, parallel, platform, ModelSettings())
    load_weights(chunks, RandomInit(architecture, 0), parallel)
    for asynchronous in (False, True):
        writer = CheckpointWriter(tmp / f"run-{asynchronous}", architecture, asynchronous=asynchronous)
        saved = writer.save(TrainState(chunks, step=6))
        writer.wait()
        load(CheckpointInfo.read(saved), TrainState(chunks))
    return "loaded"


def test_copies_with_other_names_are_the_users(attacked, tmp_path: Path) -> None:
    for name in ("step-00000005", "step-00000005-best", "step-best", "step-5", "step-00000004.partial"):
        shutil.copytree(attacked[0] / "run" / "step-00000006", tmp_path / name)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000005"]
    (tmp_path / "latest").write_bytes(b"\xff\xfe../../etc")
    assert CheckpointInfo.read(tmp_path).directory.name == "step-00000005"


def test_archives_are_what_torch_makes_them(attacked) -> None:
    """The checks look into zip archives of torch.save: a format change would make them blind."""
    common = attacked[0] / "run" / "step-00000006" / "common.pt"
    if not common.exists():
        pytest.skip("this Megatron-Core keeps these values in .distcp files")
    assert zipfile.is_zipfile(common)


# place in iwsft.json, value
ODD_VALUES: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", 10**400),
    ("config.precision", []),
    ("config.precision.dtype", "int4"),
    ("config.run", "r"),
    ("config.run.seed", "a"),
    ("config.model.hf", ["/"]),
    ("config.data.corpora", [3]),
    ("config.data.corpora", [{"corpus": "c", "weight": "heavy"}]),
    ("config.data.global_batch_size", 0),
    ("config.objective.name", {}),
    ("config.adapter", [1]),
    ("config.adapter.alpha", "a"),
    ("config.parallel.context", "1"),
    ("host", []),
    ("host.divergence", {"rewinds": "a"}),
    ("host.divergence", {"losses": [[]]}),
    ("host.data", {}),
    ("host.data", {"start": {"stop": 1}, "global_batch_size": 1, "first_epochs": []}),
    ("host.stop_early", {"metric": "a"}),
    ("host.best", {"metric": "a", "mode": "min", "entries": [[1]]}),
    ("adapter", {"rank": 0, "alpha": 1.0, "targets": ["qkv"], "base": "a"}),
    ("adapter", {"rank": 1, "alpha": float("nan"), "targets": ["qkv"], "base": "a"}),
    ("adapter", {"rank": 1, "alpha": 1.0, "targets": ["all"], "base": "a"}),
]


@pytest.mark.parametrize(("place", "value"), ODD_VALUES, ids=[f"{p} {v!r:.20}" for p, v in ODD_VALUES])
def test_odd_values_in_a_checkpoints_description(attacked, place: str, value: Any, tmp_path: Path) -> None:
    """With the right checksum, as an attacker who knows the format would give it."""
    content = json.loads((attacked[0] / "run" / "step-00000006" / INFO).read_text())
    del content["checksum"]
    at = content
    *sections, last = place.split(".")
    for section in sections:
        at = at.setdefault(section, {})
    at[last] = value
    (tmp_path / INFO).write_text(json.dumps(content | {"checksum": info_checksum(content)}))
    with pytest.raises(CheckpointError, match=f"iwsft.json is damaged: {re.escape(place)}"):
        CheckpointInfo.read(tmp_path)


def test_a_fifo_in_place_of_latest_does_not_hang(attacked, tmp_path: Path) -> None:
    shutil.copytree(attacked[0] / "run" / "step-00000006", tmp_path / "step-00000006")
    os.mkfifo(tmp_path / "latest")
    assert CheckpointInfo.read(tmp_path).directory.name == "step-00000006"
