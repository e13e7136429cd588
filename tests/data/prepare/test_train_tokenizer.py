"""Tokenizers for models that start from random weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.data.prepare import train_tokenizer as module
from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": "12 plus 30 is 42"}\n' + '{"a": ' + "[" * 100_000 + "\nno JSON\n")
    return path


def test_a_tokenizer_can_be_read_and_trained_again(records: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train_tokenizer([records], tmp_path / "t", fields=["a"], vocab_size=270)
        assert load_tokenizer(tmp_path / "t").eos_token == "<|im_end|>"
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("last", ["tokenizer_config.json", "tokenizer.json"])
def test_a_failed_write_leaves_no_tokenizer(last: str, records: Path, tmp_path: Path, monkeypatch) -> None:
    write_text, write_json = module.write_text, module.write_json

    def full(write: Any) -> Any:
        def attempt(path: Path, value: Any) -> None:
            if path.name == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, value)

        return attempt

    monkeypatch.setattr(module, "write_text", full(write_text))
    monkeypatch.setattr(module, "write_json", full(write_json))
    with pytest.raises(DataError, match=r"cannot write the tokenizer .*/t: No space left on device"):
        train_tokenizer([records], tmp_path / "t", fields=["a"], vocab_size=270)
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "t")
