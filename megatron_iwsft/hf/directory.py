"""Read Hugging Face model directories slice by slice and write them tensor by tensor. Safetensors only: no remote code, no pickle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.mapping import Span, shapes
from megatron_iwsft.hf.safetensors import SafetensorsFile, write_safetensors
from megatron_iwsft.utils.files import atomic_directory, write_json
from megatron_iwsft.utils.json_files import PlainName, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "vocab.json",
    "merges.txt",
)
GENERATION = "generation_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Index(TypedDict):
    weight_map: dict[str, PlainName]


class TensorSource(Protocol):
    """A source of weights, by Hugging Face tensor name."""

    architecture: Architecture

    def read(self, name: str, span: Span) -> Tensor:
        """Return the slice [start, stop) of tensor `name` along one dimension, on CPU."""
        ...


class SafetensorsDirectory:
    """A Hugging Face directory with one or several safetensors files.

    The constructor checks that every tensor of the architecture is present with the expected shape, and that there are no others.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.architecture = Architecture.from_directory(directory)
        weight_map = self._weight_map()
        self._file_of: dict[str, SafetensorsFile] = {}
        for name in sorted(set(weight_map.values())) or [_SINGLE]:
            try:
                file = SafetensorsFile(self.directory / name)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.directory / name} is missing, but {_INDEX} lists it. Download or export the model again."
                ) from None
            for tensor in file.shapes:
                if tensor in self._file_of:
                    raise CheckpointError(
                        f"{self.directory}: tensor {tensor} is in two files, {self._file_of[tensor].path.name} and {name}. "
                        "Remove one of them, or download the model again."
                    )
                self._file_of[tensor] = file
        for tensor, name in weight_map.items():
            if tensor not in self._file_of or self._file_of[tensor].path.name != name:
                raise CheckpointError(
                    f"{self.directory / _INDEX} lists tensor {tensor} in {name}, which does not contain it. The index and the files "
                    "are from different exports; download or export both again."
                )
        self._check({name: file.shapes[name] for name, file in self._file_of.items()})

    def _weight_map(self) -> dict[str, str]:
        """Tensor name → file name, from the index; empty if there is a single file."""
        index = self.directory / _INDEX
        if index.exists():
            # The files themselves may be links: the Hugging Face cache consists of them.
            found = read_json(index, _Index, CheckpointError, advice="Download or export the model again.")
            if not found["weight_map"]:
                raise CheckpointError(
                    f"{index} is damaged: its weight_map is empty. Download or export the model again."
                )
            return found["weight_map"]
        if (self.directory / _SINGLE).exists():
            return {}
        raise CheckpointError(
            f"{self.directory} has neither {_SINGLE} nor {_INDEX}. Only safetensors is supported. "
            "Download the model's safetensors files, or convert it with `save_pretrained`."
        )

    def _check(self, found: dict[str, tuple[int, ...]]) -> None:
        expected = shapes(self.architecture)
        if self.architecture.tied:
            found.pop("lm_head.weight", None)  # some exporters store the tied weight twice
        for name in list(found):
            if name.endswith("rotary_emb.inv_freq"):
                del found[name]
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} is missing from the safetensors files. "
                    "Download or export the model again."
                )
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} has shape {found[name]}, but config.json implies {shape}. "
                    "Use the config.json that belongs to these weights."
                )
        extra = sorted(set(found) - set(expected))
        if extra:
            raise CheckpointError(
                f"{self.directory}: unexpected tensor {extra[0]}, which a {self.architecture.family} model does not have. "
                "Use the config.json that belongs to these weights."
            )

    def read(self, name: str, span: Span) -> Tensor:
        return self._file_of[name].read(name, *span)


class ReadingProgress:
    """A source that shows a progress bar on a terminal. total: number of elements to read, or slightly more."""

    def __init__(self, source: TensorSource, total: int, *, shown: bool) -> None:
        self.architecture = source.architecture
        self._source = source
        self._bar = tqdm(total=total, desc="weights", unit="", unit_scale=True, disable=None if shown else True)

    def read(self, name: str, span: Span) -> Tensor:
        part = self._source.read(name, span)
        self._bar.update(part.numel())
        return part

    def close(self) -> None:
        self._bar.update((self._bar.total or 0) - self._bar.n)  # padding is in the total but is not read
        self._bar.close()


class RandomInit:
    """Random weights that depend only on the seed and the tensor's name, and so not on the parallel layout.

    Normal with std initializer_range, divided by √(2·layers) for the output projections of each block (as in Megatron); norms multiply
    by 1, biases are 0.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture, self._seed = architecture, seed
        self._shapes = shapes(architecture)

    def read(self, name: str, span: Span) -> Tensor:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            full = torch.zeros(shape)
        elif name.endswith("norm.weight"):
            full = torch.zeros(shape) if self.architecture.zero_centered_norms else torch.ones(shape)
        else:
            std = self.architecture.init_std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.architecture.num_layers) ** 0.5
            full = torch.randn(shape, generator=generator_for(self._seed, name)) * std
        dim, start, stop = span
        return full.narrow(dim, start, stop - start)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A random generator that depends on both."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files in `directory` and the generation config; an empty list if there is no tokenizer."""
    found = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    return found + [path for path in [directory / GENERATION] if found and path.is_file()]


def write_directory(
    output: Path,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    *,
    names: Iterable[str],
    dtype: torch.dtype,
    finish: Callable[[Path], None] = lambda partial: None,
    shard_bytes: int = 4 * 2**30,
    exist_ok: bool = False,
) -> None:
    """Write a Hugging Face directory, with one tensor in memory at a time.

    read(name) returns the full tensor. It is called in the order of `names`; tensors of one parameter should be adjacent.
    finish(directory) writes the other files. The directory gets its name only once it is complete.
    exist_ok: if another process completes `output` first, keep that and discard this one, having read every tensor.
    Raises CheckpointError if `output` exists or cannot be written.
    """
    with new_directory(output, exist_ok=exist_ok) as partial:
        _write_files(partial, architecture, read, names, dtype, shard_bytes)
        finish(partial)


@contextmanager
def new_directory(output: Path, *, exist_ok: bool) -> Iterator[Path]:
    """Within the block, a directory that becomes `output` once the block has ended. exist_ok, and what is raised: see `write_directory`."""
    if os.path.lexists(output) and not exist_ok:
        raise CheckpointError(f"{output} already exists. Remove it, or choose another output directory.")
    try:
        with atomic_directory(output) as partial:
            yield partial
    except FileExistsError:
        if not (exist_ok and output.is_dir()):
            raise CheckpointError(
                f"another process has written {output} in the meantime. That directory is unchanged; this export was discarded. "
                "Choose another output, or use that directory."
            ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot write {output}: {error.strerror} ({error.filename or output}). Check the disk's space and permissions."
        ) from None


def _write_files(
    directory: Path,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    names: Iterable[str],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Weights, their index, and config.json."""
    files = _plan_files(names, shapes(architecture), dtype, shard_bytes)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for file in files.values() for shape in file.values())
    with tqdm(total=total, desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
        for file, tensors in files.items():
            write_safetensors(directory / file, tensors, read, dtype, written=bar.update)
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / _INDEX, index, indent=2, sort_keys=True)
    config = {k: v for k, v in architecture.hf.items() if k not in ("torch_dtype", "dtype", "_name_or_path")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", config, indent=2, sort_keys=True)


def _plan_files(
    names: Iterable[str], all_shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name → its tensors and their shapes. A file has at most `shard_bytes`, unless a single tensor is larger."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name in names:
        size = torch.Size(all_shapes[name]).numel() * dtype.itemsize
        if groups[-1] and used + size > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = all_shapes[name]
        used += size
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
