"""Read and write safetensors files: header length (u64), a JSON header, then the tensors' bytes one after another.

Slices are read into ordinary memory. The `safetensors` library maps the whole file instead, and mapped pages count towards each
rank's memory, up to the size of the model. Tensors are written in blocks of rows.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.quantization import how_to_dequantise
from megatron_iwsft.utils.files import atomic_write, open_regular
from megatron_iwsft.utils.json_files import check_json, fits, parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # limit set by the format
_BLOCK = 1 << 24


class _Entry(TypedDict):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


class SafetensorsFile:
    """An open safetensors file. Raises FileNotFoundError if it is missing, CheckpointError if it is truncated or not valid.

    shapes    tensor name → shape, for every tensor in the file
    metadata  the file's own, text by name
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path, buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            self._header, self._start = self._read_header(size)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        except ValueError as error:
            raise self._damaged(str(error)) from None
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read as safetensors: {why}. Download or export it again.")

    def _read_header(self, size: int) -> tuple[dict[str, Any], int]:
        """The entries of all tensors, checked against the file size, and the offset of the first tensor's bytes."""
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its {size} bytes are too few for the header length it declares")
        advice = "Download or export it again."
        where = f"{self.path} cannot be read as safetensors: its header"
        content = parse_json(self._file.read(length), dict[str, Any], CheckpointError, where=where, advice=advice)
        notes = content.pop("__metadata__", None)
        self.metadata: dict[str, str] = notes if fits(notes, dict[str, str]) else {}
        header: Any = check_json(content, dict[str, _Entry], CheckpointError, where=where, advice=advice)
        end = 0
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has dtype {entry['dtype']}; supported are {', '.join(_DTYPES)}. "
                    f"{how_to_dequantise()}"
                )
            begin, stop = entry["data_offsets"]
            if stop - begin != math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
                raise ValueError(f"the data offsets of tensor {name} do not match its shape and dtype")
            end = max(end, stop)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, but its header declares {8 + length + end}")
        return header, 8 + length

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read the slice [start, stop) of a tensor along dimension 0 or 1, on CPU, in the file's dtype, and nothing else."""
        entry = self._header[name]
        dtype, shape = _DTYPES[entry["dtype"]], list(entry["shape"])
        row = torch.Size(shape[dim + 1 :]).numel() * dtype.itemsize  # bytes of one index along `dim`
        at = self._start + entry["data_offsets"][0] + start * row
        stride, rows = shape[dim] * row, torch.Size(shape[:dim]).numel()
        shape[dim] = stop - start
        out = torch.empty(shape, dtype=dtype)
        length = (stop - start) * row
        if length == stride:
            rows, length = 1, length * rows
        if length == 0:
            return out
        # The file's bytes go directly into the tensor's memory, without a further copy.
        target = out.view(-1).view(torch.uint8).numpy().data
        for i in range(rows):
            self._read_at(target[i * length : (i + 1) * length], at + i * stride)
        return out

    def _read_at(self, target: memoryview, at: int) -> None:
        while target:  # one call reads at most 2 GiB
            got = os.preadv(self._file.fileno(), [target], at)
            if got == 0:
                raise self._damaged("it became shorter after it was opened")
            target, at = target[got:], at + got


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    written: Callable[[int], object] = lambda size: None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the tensors of `shapes` in that order. `read` is called once per tensor; `written` gets the bytes of each block.

    Raises CheckpointError if a tensor does not have the shape given in `shapes`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    at = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            tensor = read(name)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, but the config implies {shape}. "
                    "Use the config that belongs to these weights."
                )
            for block in _row_blocks(tensor):
                data = block.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
                file.write(data.data)
                written(len(data))


def _row_blocks(tensor: Tensor) -> Iterable[Tensor]:
    """Blocks of about 16 MB, so that the dtype conversion never copies the full tensor."""
    if tensor.ndim == 0:
        return [tensor]
    row = max(1, tensor[:1].numel() * tensor.element_size())
    return tensor.split(max(1, _BLOCK // row))
