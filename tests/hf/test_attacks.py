"""Malicious and damaged model directories are refused by name, at once, whatever is in their files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import SafetensorsDirectory
from megatron_iwsft.hf.rope import Rope
from megatron_iwsft.hf.safetensors import SafetensorsFile
from megatron_iwsft.hf.transformers_models import load_tokenizer_in_transformers
from megatron_iwsft.utils.files import sampled_fingerprint
from tests.support import tiny

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "model_type of no type": ({"model_type": ["qwen2"]}, "model_type .* is not supported"),
    "many layers": ({"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 2,048"),
    "too many layers to print": ({"num_hidden_layers": 10**4000}, "num_hidden_layers must be at most 2,048"),
    "wide": ({"hidden_size": 2**40}, "hidden_size must be at most"),
    "a large vocabulary": ({"vocab_size": 2**62}, "vocab_size must be at most"),
    "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number"),
    "a huge epsilon": ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
    "theta is NaN": ({"rope_theta": float("nan")}, "rope_theta must be a number"),
    "theta is zero": ({"rope_theta": 0}, "rope_theta must be positive"),
    "factor is zero": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
    "rope of no type": ({"rope_scaling": {"rope_type": [1]}}, "rope type .* is not supported"),
    "part of a head of no size": (
        {"model_type": "phi3", "partial_rotary_factor": 0},
        "partial_rotary_factor must be above 0",
    ),
    "an odd part of a head": ({"model_type": "phi3", "partial_rotary_factor": 0.9}, "an even number of dimensions"),
    "attention without scale": (
        {"model_type": "gemma3_text", "hidden_activation": "silu", "query_pre_attn_scalar": -1},
        r"query_pre_attn_scalar -1\.0 is not supported",
    ),
    "layer types of no type": ({"layer_types": [[], {}, 1, None]}, "layer type .* is not supported"),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_absurd_configs_are_refused(attack: str) -> None:
    changes, message = CONFIGS[attack]
    with pytest.raises(CheckpointError, match=message) as refusal:
        Architecture.from_hf(tiny.model_config(**changes), where="config.json")
    assert len(str(refusal.value)) < 500


def test_usual_scalings_are_accepted() -> None:
    for scaling in ({"rope_type": "linear", "factor": 2}, {"rope_type": "yarn", "factor": 4.0, "truncate": False}):
        Rope.from_hf(scaling, theta=1e4, max_positions=64, where="config.json").inverse_frequencies(8)


def entry(**changes: Any) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


FILES = {
    "deep header": struct.pack("<Q", 90_000) + b'{"a":' * 18_000,
    "shape of no type": entry(shape=["1"]),
    "negative shape": entry(shape=[-1, -1]),
    "overflowing shape": entry(shape=[2**62, 4, 4]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "negative offset": entry(data_offsets=[-4, 0]),
    "dtype of no type": entry(dtype=["F32"]),
    "header is a list": struct.pack("<Q", 4) + b"[1] ",
}


@pytest.mark.parametrize("attack", FILES)
def test_malicious_headers_are_refused(attack: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(FILES[attack])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def index(**content: Any) -> Callable[[Path], None]:
    return lambda directory: (directory / "model.safetensors.index.json").write_text(json.dumps(content)) and None


DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a FIFO as weights": (lambda d: os.mkfifo(d / "model.safetensors"), "it is a FIFO, not a file"),
    "a directory as weights": (lambda d: (d / "model.safetensors").mkdir(), "it is a directory, not a file"),
    "a FIFO as index": (lambda d: os.mkfifo(d / "model.safetensors.index.json"), "it is a FIFO, not a file"),
    "a file elsewhere": (index(weight_map={"a": "/etc/passwd"}), "is not a plain file name"),
    "files of no type": (index(weight_map={"a": 3}), r"damaged: weight_map\.a"),
    "no weight map": (index(weights=1), "damaged: weight_map"),
    "a FIFO as config": (
        lambda d: (d / "config.json").unlink() or os.mkfifo(d / "config.json"),
        "it has no config.json",
    ),
    "a deep config": (lambda d: (d / "config.json").write_text('{"a":' * 99_999), "is not valid JSON"),
}


@pytest.mark.parametrize("attack", DIRECTORIES)
def test_malicious_directories_are_refused(attack: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.model_config()))
    apply, message = DIRECTORIES[attack]
    apply(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsDirectory(tmp_path)


def test_transformers_is_not_left_waiting_for_a_fifo(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.model_config()))
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a FIFO"):
        load_tokenizer_in_transformers(tmp_path)
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(OSError, match="it is a FIFO"):
        sampled_fingerprint(tmp_path, "*.safetensors")
