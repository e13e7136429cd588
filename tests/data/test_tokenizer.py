"""Tokenizers that are not a tokenizer.json: SentencePiece models with the files beside them, and files that have to be converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "spm.model"])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_beside_a_sentencepiece_model_is_read_and_kept(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / "in").mkdir()
    tiny.sentencepiece_model(tmp_path / "spm.model").rename(tmp_path / "in" / name)
    text = TEMPLATE if file.endswith(".jinja") else json.dumps({"chat_template": TEMPLATE})
    (tmp_path / "in" / file).write_text(text)
    load_tokenizer(tmp_path / "in" / name).copy_to(tmp_path / "out")
    for path in (tmp_path / "in", tmp_path / "out"):
        template = ChatTemplate(load_tokenizer(path))
        assert template.render([{"role": "user", "content": "a"}]) == "user: a</s>"


def test_a_sentencepiece_model_without_a_template_names_the_ways_out(tmp_path: Path) -> None:
    model = tiny.sentencepiece_model(tmp_path / "spm.model")
    with pytest.raises(DataError, match=r"no chat template\. Choose one with --template .*, or add chat_template\.jinja"):
        ChatTemplate(load_tokenizer(model))
