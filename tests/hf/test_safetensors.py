"""Our safetensors reader and writer against the `safetensors` library; invalid files; a slice reads only its own bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.safetensors import SafetensorsFile, write_safetensors

TENSORS = {
    "matrix": torch.arange(7 * 12, dtype=torch.float32).reshape(7, 12),
    "half": torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "vector": torch.arange(9, dtype=torch.float32),
    "cube": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> SafetensorsFile:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "x.safetensors")
    return SafetensorsFile(tmp_path / "x.safetensors")


def test_slices_equal_what_the_library_wrote(file: SafetensorsFile) -> None:
    assert file.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
    for name, tensor in TENSORS.items():
        for dim in range(min(2, tensor.ndim)):
            n = tensor.shape[dim]
            for start, stop in ((0, n), (0, n // 2), (n // 3, n), (n, n)):
                assert torch.equal(file.read(name, dim, start, stop), tensor.narrow(dim, start, stop - start)), name


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    large = torch.randn(3000, 2000)  # several blocks
    tensors = {**TENSORS, "large": large, "scalar": torch.tensor(3.0), "strided": large[:50].t()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        write_safetensors(tmp_path / "y", shapes, tensors.__getitem__, dtype)
        found = load_file(tmp_path / "y")
        assert all(torch.equal(found[name], t.to(dtype)) for name, t in tensors.items())


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor vector has shape \(9,\), but the config implies \(8,\)"):
        write_safetensors(tmp_path / "z", {"vector": (8,)}, TENSORS.__getitem__, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_only_the_slice_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.randn(512, 4096)}, tmp_path / "w")
    file = SafetensorsFile(tmp_path / "w")
    for dim, length in ((0, 512), (1, 4096)):
        before = _bytes_read()
        part = file.read("w", dim, length // 4, length // 2)
        read = _bytes_read() - before
        assert part.nbytes <= read <= part.nbytes + 4096, "the count includes reading /proc/self/io"


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def header_length(content: bytes) -> int:
    return struct.unpack("<Q", content[:8])[0]


def edit_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Damage that replaces the header by a changed one."""

    def damage(content: bytes) -> bytes:
        end = 8 + header_length(content)
        header = json.loads(content[8:end])
        change(header)
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + content[end:]

    return damage


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "last byte missing": (lambda good: good[:-1], "its header declares"),
    "cut in the length": (lambda good: good[:5], "too few for the header length"),
    "cut in the header": (lambda good: good[:100], "too few for the header length"),
    "empty": (lambda good: b"", "too few for the header length"),
    "another format": (lambda good: b"PK\x03\x04" + good, "too few for the header length"),
    "one byte too many": (lambda good: good + b"x", "its header declares"),
    "header is not JSON": (lambda good: struct.pack("<Q", 20) + b"\xff" * 20, "cannot be read as safetensors"),
    "unsupported dtype": (
        edit_header(lambda h: h["vector"].update(dtype="F8_E4M3")),
        "tensor vector has dtype F8_E4M3",
    ),
    "wrong shape": (
        edit_header(lambda h: h["vector"].update(shape=[10])),
        "offsets of tensor vector do not match its shape",
    ),
    "no shape": (edit_header(lambda h: h["vector"].pop("shape")), "cannot be read as safetensors"),
    "entry is a number": (edit_header(lambda h: h.update(vector=3)), "cannot be read as safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_rejected(damage: str, tmp_path: Path, file: SafetensorsFile) -> None:
    apply, message = DAMAGE[damage]
    (tmp_path / "bad").write_bytes(apply(file.path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(tmp_path / "bad")


def test_a_file_truncated_while_open_is_reported(file: SafetensorsFile) -> None:
    good = file.path.read_bytes()
    file.path.write_bytes(good[: 8 + header_length(good)])
    with pytest.raises(CheckpointError, match="shorter after it was opened"):
        file.read("matrix", 0, 0, 7)
