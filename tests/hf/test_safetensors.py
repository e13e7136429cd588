"""The safetensors format against the usual library: slices, types, damage; and that a rank reads its slices and nothing else."""

from __future__ import annotations

import json
import struct
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


def test_slices_are_what_the_library_wrote(file: SafetensorsFile) -> None:
    assert file.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
    for name, tensor in TENSORS.items():
        for dim in range(min(2, tensor.ndim)):
            n = tensor.shape[dim]
            for start, stop in ((0, n), (0, n // 2), (n // 3, n), (n, n)):
                assert torch.equal(file.read(name, dim, start, stop), tensor.narrow(dim, start, stop - start)), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    large = torch.randn(3000, 2000)  # of several blocks
    tensors = {**TENSORS, "large": large, "scalar": torch.tensor(3.0), "strided": large[:50].t()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        write_safetensors(tmp_path / "y", shapes, tensors.__getitem__, dtype)
        found = load_file(tmp_path / "y")
        assert all(torch.equal(found[name], t.to(dtype)) for name, t in tensors.items())
    with pytest.raises(CheckpointError, match=r"tensor vector has shape \(9,\) where the config implies \(8,\)"):
        write_safetensors(tmp_path / "z", {"vector": (8,)}, tensors.__getitem__, torch.float32)


def test_only_the_slice_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.randn(512, 4096)}, tmp_path / "w")
    file = SafetensorsFile(tmp_path / "w")
    for dim, length in ((0, 512), (1, 4096)):
        before = _bytes_read()
        part = file.read("w", dim, length // 4, length // 2)
        read = _bytes_read() - before
        assert part.nbytes <= read <= part.nbytes + 4096, "the counter's own file is in there, too"


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_damage_is_named(tmp_path: Path, file: SafetensorsFile) -> None:
    good = file.path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])

    def with_header(change) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed)
        encoded = json.dumps(changed).encode()
        return struct.pack("<Q", len(encoded)) + encoded + good[8 + length :]

    cases = [
        (good[:-1], "its header announces"),
        (good[:5], "do not hold the header"),
        (good[:100], "do not hold the header"),
        (b"", "do not hold the header"),
        (b"PK\x03\x04" + good, "do not hold the header"),
        (good + b"x", "its header announces"),
        (struct.pack("<Q", 20) + b"\xff" * 20, "cannot be read as safetensors"),
        (with_header(lambda h: h["vector"].update(dtype="F8_E4M3")), "tensor vector is of type F8_E4M3"),
        (with_header(lambda h: h["vector"].update(shape=[10])), "tensor vector does not fit its place"),
        (with_header(lambda h: h["vector"].pop("shape")), "cannot be read as safetensors"),
        (with_header(lambda h: h.update(vector=3)), "cannot be read as safetensors"),
    ]
    for content, message in cases:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            SafetensorsFile(tmp_path / "bad")

    file.path.write_bytes(good[: 8 + length])  # while it is open
    with pytest.raises(CheckpointError, match="shorter since it was opened"):
        file.read("matrix", 0, 0, 7)
