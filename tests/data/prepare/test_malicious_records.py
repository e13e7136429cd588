"""Records, inputs and expressions that are made to break the command that reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.expressions import compile_expression
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.inspect import Inspection
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from tests.support import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.hf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


EXPRESSIONS = ["'a' * 10000000000000", "'%1000000000d' % judge", "[1] * 99", "((" * 9999, "judge ** 9", "9" * 5000]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda e: e[:20])
def test_expressions_that_could_take_all_memory_are_refused(expression: str) -> None:
    with pytest.raises(DataError, match="is not a valid expression over fields"):
        compile_expression(expression)


@pytest.mark.parametrize("text", ["judge * 99999999999999", "judge % 5", "judge + 5", "number * number"])
def test_arithmetic_on_the_texts_of_a_record_is_refused(text: str) -> None:
    with pytest.raises((TypeError, OverflowError)):
        compile_expression(text)({"judge": "%1000000000d", "number": 10**4000})


DEEP = [
    b'{"prompt": "a", "response": "b", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"prompt": "a", "response": "b", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
    + (b"[" * 1000 + b"]" * 1000)
    + b"}]}",
]


def test_deeply_nested_records_are_dropped(tmp_path: Path, tokenizer: Path) -> None:
    good = b'{"prompt": "a", "response": "b", "x": 3}'
    (tmp_path / "r.jsonl").write_bytes(b"\n".join([good, *DEEP]))
    settings = ShardSettings(str(tokenizer), curation=Curation(keep="str(x) != '5' and x == x"))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    assert len(Corpus.open(tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_inputs_that_are_no_files_are_refused(kind: str, tmp_path: Path, tokenizer: Path) -> None:
    os.mkfifo(tmp_path / "r.jsonl")
    path = tmp_path / "r.jsonl" if kind == "FIFO" else Path("/dev/zero")
    with pytest.raises(DataError, match=f"is a {kind}"):
        shard_corpus([path], tmp_path / "out", ShardSettings(str(tokenizer)), show_progress=False)


def test_text_of_records_cannot_control_the_terminal(tmp_path: Path, tokenizer: Path) -> None:
    escape = "\x1b[2J\x1b]0;owned\x07\u202e\x9b1m"
    record = {"id": f"i{escape}", "prompt": f"p{escape}", "response": f"r{escape}\r", "from": f"s{escape}"}
    tiny.write_jsonl(tmp_path / "r.jsonl", [record])
    settings = ShardSettings(str(tokenizer), record=RecordFormat(source_field="from"))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    text = Inspection(Corpus.open(tmp_path / "out"), seq_lengths=[], samples=1).to_terminal(colour=False)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "i\\x1b[2J\\x1b]0;owned\\x07\\u202e\\x9b1m" in text
