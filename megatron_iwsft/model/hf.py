"""Hugging Face model directories: read by slices, written one tensor at a time. Only safetensors; no remote code, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.model.architecture import Architecture
from megatron_iwsft.model.weights import Span, shapes

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorSource(Protocol):
    """Where initial weights come from, by Hugging Face tensor name."""

    architecture: Architecture

    def read(self, name: str, span: Span) -> Tensor:
        """The part [start, stop) of tensor `name` along one dimension, on CPU."""
        ...


class SafetensorsDirectory:
    """A Hugging Face directory of (possibly sharded) safetensors files.

    Opening checks that every tensor of the architecture is there in the expected shape and that nothing is left over.
    """

    def __init__(self, directory: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.directory = Path(directory)
        self.architecture = Architecture.from_directory(directory)
        files = self._files()
        self._file_of: dict[str, str] = {}
        self._open = {}
        found: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                handle = safe_open(self.directory / file, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{self.directory / file} is missing; {_INDEX} names it.") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.directory / file} cannot be read as safetensors: {error}. Download it again."
                ) from None
            self._open[file] = handle
            for name in handle.keys():  # noqa: SIM118 - not a dict
                found[name] = tuple(handle.get_slice(name).get_shape())
                self._file_of[name] = file
        self._check(found)

    def _files(self) -> list[str]:
        index = self.directory / _INDEX
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(
                    f"{index} is not a valid index: expected a weight_map of tensor names to files."
                ) from None
            outside = [n for n in names if Path(n).name != n]
            if outside:
                raise CheckpointError(f"{index} names a file outside its directory: {outside[0]}.")
            return names
        if (self.directory / _SINGLE).exists():
            return [_SINGLE]
        raise CheckpointError(f"{self.directory} has neither {_SINGLE} nor {_INDEX}. Only safetensors are read.")

    def _check(self, found: dict[str, tuple[int, ...]]) -> None:
        expected = shapes(self.architecture)
        if self.architecture.tied:
            found.pop("lm_head.weight", None)  # some writers store the tied copy
        for name in list(found):
            if name.endswith("rotary_emb.inv_freq"):
                del found[name]
        for name, shape in expected.items():
            if name not in found:
                raise CheckpointError(f"{self.directory}: tensor {name} is missing from the safetensors files.")
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.directory}: tensor {name} has shape {found[name]}, but config.json implies {shape}."
                )
        extra = sorted(set(found) - set(expected))
        if extra:
            raise CheckpointError(
                f"{self.directory}: tensor {extra[0]} has no place in a {self.architecture.family} model."
            )

    def read(self, name: str, span: Span) -> Tensor:
        dim, start, stop = span
        view = self._open[self._file_of[name]].get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]


class RandomInit:
    """Random weights that depend on the seed and a tensor's name alone, so on no layout.

    Normal with the config's initializer_range; output projections of each block scaled by 1/√(2·layers), as Megatron does;
    norms one, biases zero.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture, self._seed = architecture, seed
        self._shapes = shapes(architecture)

    def read(self, name: str, span: Span) -> Tensor:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            whole = torch.zeros(shape)
        elif name.endswith("norm.weight"):
            whole = torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            std = self.architecture.init_std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.architecture.num_layers) ** 0.5
            whole = torch.randn(shape, generator=generator) * std
        dim, start, stop = span
        return whole.narrow(dim, start, stop - start)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files that lie in `directory`."""
    return [directory / name for name in _TOKENIZER_FILES if (directory / name).exists()]


def write_directory(
    output: Path,
    architecture: Architecture,
    read: Callable[[str], Tensor],
    *,
    names: Iterable[str],
    dtype: torch.dtype,
    extra_files: Iterable[Path] = (),
    card: str | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face directory, holding one tensor at a time.

    read(name) returns a whole tensor; `names` gives the order in which it is asked, best such that tensors of one parameter
    follow each other. The directory appears under its name only once complete. Raises CheckpointError if `output` exists.
    """
    if output.exists():
        raise CheckpointError(f"{output} already exists. Remove it, or choose another output directory.")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        all_shapes = shapes(architecture)
        size = torch.empty((), dtype=dtype).element_size()
        groups: list[list[str]] = [[]]
        used = 0
        for name in names:
            numel = torch.Size(all_shapes[name]).numel() * size
            if groups[-1] and used + numel > shard_bytes:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += numel
        weight_map = {}
        for i, group in enumerate(groups, 1):
            file = _SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            _write_safetensors(partial / file, group, all_shapes, read, dtype)
            weight_map.update(dict.fromkeys(group, file))
        if len(groups) > 1:
            total = sum(torch.Size(all_shapes[n]).numel() for g in groups for n in g) * size
            _write_json(partial / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = {k: v for k, v in architecture.hf.items() if k not in ("torch_dtype", "dtype", "_name_or_path")}
        _write_json(partial / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        for file_path in extra_files:
            shutil.copyfile(file_path, partial / file_path.name)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error.strerror} ({error.filename or output}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_safetensors(
    path: Path,
    names: list[str],
    all_shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """The safetensors format: header length (u64), JSON header, then the tensors' bytes end to end."""
    size = torch.empty((), dtype=dtype).element_size()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        numel = torch.Size(all_shapes[name]).numel() * size
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(all_shapes[name]), "data_offsets": [at, at + numel]}
        at += numel
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor = read(name).to(dtype).contiguous()
            if tuple(tensor.shape) != all_shapes[name]:
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(tensor.shape)} where the config implies {all_shapes[name]}."
                )
            file.write(tensor.view(torch.uint8).numpy().data if tensor.ndim else tensor.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
