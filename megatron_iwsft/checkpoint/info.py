"""The checkpoint directory and what it says about itself, without reading a tensor.

    checkpoints/
        latest                 name of the newest complete checkpoint, replaced atomically
        best                   with `checkpoint.best`: names of the best ones, one per line, likewise
        step-00000100/
            iwsft.json         step, architecture, layout, resolved config, host state, and size and SHA-256 of every other file;
                               a directory that has it is complete
            tokenizer/         so that an export needs nothing else
            .metadata, *.distcp, common.pt, metadata.json    Megatron-Core's `dist_checkpointing` (torch_dist)

A checkpoint is written (writer.py) under `step-….partial`, a unique name, and renamed when every rank is done.

`.metadata`, `common.pt` and parts of `*.distcp` are pickles, by Megatron-Core's and torch's format. Before they are loaded, owners and
checksums of all files are checked (integrity.py), and the pickles themselves (pickles.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

import numpy as np
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.info_schema import Finite, HostStates, SavedConfig
from megatron_iwsft.checkpoint.names import CHECKPOINTS, INFO, LATEST
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError, DamageError
from megatron_iwsft.hf.adapters import AdapterSettings, Target
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.utils.files import PARTIAL, read_regular
from megatron_iwsft.utils.json_files import (
    KEEP_UNKNOWN_KEYS,
    Count,
    PlainPath,
    Positive,
    check_json,
    is_regular_file,
    parse_json,
)
from megatron_iwsft.utils.node_arrays import node_arrays

FORMAT_VERSION = 4
_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = re.compile(rf"{_NAME.pattern}\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


class _Layout(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    data: int
    sequence: bool
    layers_per_stage: list[int] | None


class AdapterInfo(TypedDict):
    """Of a checkpoint that holds adapters instead of weights. base: the fingerprint of the weights that they belong to."""

    rank: Positive
    alpha: Finite
    targets: list[Target]
    base: str


class _Info(TypedDict):
    step: Count
    architecture: dict[str, Any]
    layout: _Layout
    config: SavedConfig
    template_hash: str | None
    corpora: NotRequired[dict[str, str]]
    corpus: NotRequired[str | None]  # of one corpus, written in place of `corpora` before there were mixtures
    objective: str | None
    adapter: NotRequired[AdapterInfo | None]
    host: HostStates
    files: dict[PlainPath, integrity.FileSum]


@dataclass(frozen=True)
class CheckpointInfo:
    """What `iwsft.json` says.

    layout     that it was saved at
    corpora    name → fingerprint of each training corpus, in order
    objective  SHA-256 of the file of a custom objective
    adapter    None if it holds the model's weights
    host       states of `TrainState.host`
    files      name under the directory → size and SHA-256
    """

    directory: Path
    step: int
    architecture: Architecture
    config: dict[str, Any]
    layout: ParallelLayout
    template_hash: str | None
    corpora: dict[str, str]
    objective: str | None
    host: dict[str, Any]
    files: dict[str, integrity.FileSum]
    adapter: AdapterInfo | None = None

    @staticmethod
    def read(directory: str | Path, *, once_per_node: bool = False) -> CheckpointInfo:
        """Of a checkpoint, or of the newest one in a run directory or a directory of checkpoints.

        once_per_node: every process of a job calls this; on each node one of them reads the file, and the others its copy.

        Raises CheckpointError if there is none, or if it is incomplete or damaged.
        """
        given, directory = Path(directory), _newest(Path(directory))
        path = directory / INFO
        if not is_regular_file(path) and _is_of_megatron(directory):
            raise CheckpointError(
                f"{given} is a checkpoint of another Megatron-Core program: it has no {INFO}, which says what model it is. Read its "
                "weights with `iwsft import --megatron`, then name the result as model.checkpoint."
            )
        if not is_regular_file(path):
            raise CheckpointError(
                f"{given} holds no complete checkpoint: it has no {INFO}. "
                "Give a run directory, or a checkpoint that is complete."
            )
        advice = "Use another checkpoint."
        content = _content_by_node if once_per_node else read_regular
        try:
            found = parse_json(content(path), dict[str, Any], DamageError, where=str(path), advice=advice)
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror}. {advice}") from None
        version = found.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version!r}; this version reads {FORMAT_VERSION}. Export the checkpoint with the version that "
                "wrote it."
            )
        if found.pop("checksum", None) != info_checksum(found):
            raise DamageError(f"{path} is damaged: its checksum does not match. {advice}")
        info = check_json(found, _Info, CheckpointError, where=str(path), advice=advice)
        earlier = info.get("corpus")
        return CheckpointInfo(
            directory=directory,
            step=info["step"],
            architecture=Architecture.from_hf(info["architecture"], where=str(path)),
            config=dict(info["config"]),
            layout=ParallelLayout.from_json(dict(info["layout"])),
            template_hash=info["template_hash"],
            corpora=info.get("corpora", {"": earlier} if earlier else {}),
            objective=info["objective"],
            host=dict(info["host"]),
            files=info["files"],
            adapter=info.get("adapter"),
        )

    @property
    def adapters(self) -> AdapterSettings | None:
        """The adapters that it holds; None if it holds the model's weights."""
        if self.adapter is None:
            return None
        return AdapterSettings(self.adapter["rank"], self.adapter["alpha"], tuple(self.adapter["targets"]))

    def to_text(self) -> str:
        """The content of `iwsft.json`."""
        info = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "architecture": self.architecture.hf,
            "layout": self.layout.to_json(),
            "config": self.config,
            "template_hash": self.template_hash,
            "corpora": self.corpora,
            "objective": self.objective,
            "adapter": self.adapter,
            "host": self.host,
            "files": self.files,
        }
        info = json.loads(json.dumps(info))  # as it will be read: the checksum covers that
        return json.dumps(info | {"checksum": info_checksum(info)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file["bytes"] for file in self.files.values())

    def damage(self, *, contents: bool = True) -> list[str]:
        """One complaint per file that is missing, truncated or (with `contents`, which reads all of it) changed."""
        return integrity.damage(self.directory, self.files, sorted(self.files), contents=contents)


def _content_by_node(path: Path) -> bytes:
    """`read_regular`, by one process per node: the file has a line for each rank that wrote the checkpoint, and each rank asks for it."""
    status = path.lstat()  # a job that was restarted may find another file
    key = f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    return node_arrays(key, lambda: {"content": np.frombuffer(read_regular(path), np.uint8)})["content"].tobytes()


def _is_of_megatron(directory: Path) -> bool:
    """Whether a directory looks as Megatron-LM and Megatron-Bridge write checkpoints (torch_dist), or a directory of them."""
    one = (directory / ".metadata").exists() and (directory / "metadata.json").exists()
    return (one and _NAME.fullmatch(directory.name) is None) or any(
        (directory / name).exists() for name in ("latest_checkpointed_iteration.txt", "latest_train_state.pt")
    )


def _newest(directory: Path) -> Path:
    """`directory` itself, or the newest checkpoint below it if it is a run directory or a directory of checkpoints."""
    if (directory / INFO).exists():
        return directory
    for parent in (directory, directory / CHECKPOINTS):
        if (parent / LATEST).exists():
            newest = parent / read_latest(parent)
            # A run can be killed between replacing a checkpoint and updating `latest`.
            return newest if (newest / INFO).exists() else next(iter(complete_checkpoints(parent)), newest)
    return directory


def read_latest(parent: Path) -> str:
    """The name in `latest`; any other content is as good as none."""
    try:
        name = read_regular(parent / LATEST).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return "step-unknown"
    return name if _NAME.fullmatch(name) else "step-unknown"


def info_checksum(info: dict[str, Any]) -> str:
    """SHA-256 of the content of `iwsft.json` without its own `checksum`."""
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest first. Directories of other names, such as copies, are the user's."""
    found = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name) and (p / INFO).exists()]
    return sorted(found, key=step_of, reverse=True)


def unfinished_checkpoints(root: Path) -> list[Path]:
    """Directories under `root` that are, or were when a process was killed, being written or removed."""
    return [p for p in root.glob("step-*") if _UNFINISHED.fullmatch(p.name)]


def one_line(error: BaseException) -> str:
    """An error in one line. A CheckpointException carries every rank's traceback: the first rank's cause."""
    if isinstance(error, CheckpointException):
        error = next((failure[0] for failure in error.failures.values()), error)
    lines = str(error).strip().splitlines() or ["no further detail"]
    return f"{type(error).__name__}: {lines[0]:.300}"
