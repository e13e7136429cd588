"""Tokenizers that are not a tokenizer.json: SentencePiece models with the files beside them, and files that have to be converted."""

from __future__ import annotations

import base64
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
    with pytest.raises(
        DataError, match=r"no chat template\. Choose one with --template .*, or add chat_template\.jinja"
    ):
        ChatTemplate(load_tokenizer(model))


RANKS = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))
WAYS = {
    "tokenizer.model": (RANKS, r"tokenizer\.model is a tiktoken file\. Convert it: .*TikTokenConverter"),
    "qwen.tiktoken": (RANKS, r"qwen\.tiktoken is a tiktoken file\. Use the tokenizer\.json of Qwen/Qwen2\.5-7B"),
    "tekken.json": (b"{}", r"tekken\.json is a tekken file\. Convert it: .*convert_tekken_tokenizer"),
    "tekken_240911.json": (b"{}", r"tekken_240911\.json is a tekken file\."),
}


@pytest.mark.parametrize("name", WAYS)
def test_files_of_tiktoken_and_tekken_are_refused_with_a_way_to_convert_them(tmp_path: Path, name: str) -> None:
    content, message = WAYS[name]
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)


def test_the_advised_conversion_of_a_tekken_file_works(tmp_path: Path) -> None:
    from transformers.integrations.mistral import convert_tekken_tokenizer

    names = ("<unk>", "<s>", "</s>")
    tokens = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": 256,
        "default_vocab_size": 259,
        "default_num_special_tokens": len(names),
        "version": "v3",
    }
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": tokens, "special_tokens": special}))
    convert_tekken_tokenizer(str(file)).save_pretrained(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    (ids,) = tokenizer.encode_pieces(["<s>Zug 雪</s>"])
    assert tokenizer.decode(ids) == "<s>Zug 雪</s>" and {"<s>", "</s>"} <= tokenizer.special


def test_the_advised_conversion_of_a_tiktoken_file_works(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    converter = TikTokenConverter(str(tmp_path / "tokenizer.model"), extra_special_tokens=["<|end|>"])
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_pieces(["ab<|end|>"]) == [[97, 98, 256]] and tokenizer.special == {"<|end|>"}
