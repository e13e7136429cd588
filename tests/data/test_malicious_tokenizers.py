"""Chat templates and tokenizer files that fail, hang or take all memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_iwsft.data import template_engine
from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny
from tests.support.damage import edit_json, fifo

CHATML = PRESETS["chatml"]
HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"

# Evaluated for conversations that contain the word `now`; what the record is dropped with.
IN_TEMPLATE = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 2 ** 99999999999 }}": "OverflowError",
    "{{ 99 ** 64 ** 64 ** 64 }}": "OverflowError",
    "{{ 'a' * 10000000000000 }}": "OverflowError",
    "{{ [0] * 10000000000000 }}": "OverflowError",
    "{{ 'a'.ljust(100000000000) }}": "MemoryError",
    "{{ 'a' | center(100000000000) }}": "MemoryError",
    "{{ '%1000000000000d' % 5 }}": "(MemoryError|ValueError|OverflowError)",
    "{{ 1 | round(1000000000, 'ceil') }}": "OverflowError",
    "{{ 1 | round(-1000000000) }}": "OverflowError",
    "{{ messages[99].role.x }}": "has no element 99",
    "{{ ''.join(5) }}": "TypeError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ ''.__class__.__mro__ }}": "unsafe|undefined",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "MemoryError",
    HANG: "took longer than 0.5 seconds",
}


@pytest.mark.parametrize("attack", IN_TEMPLATE)
def test_a_template_that_fails_drops_the_record(attack: str, tmp_path: Path, monkeypatch) -> None:
    if attack == HANG:
        monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    monkeypatch.setattr(template_engine, "_EXTRA_BYTES", 1 << 28)
    source = f"{{% if 'now' in messages[0].content %}}{attack}{{% endif %}}{CHATML}"
    tiny.write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "Do it now", "response": "x"}, {"prompt": "Do not", "response": "x"}]
    )
    settings = ShardSettings(str(tiny.hf_tokenizer(tmp_path / "t", template=source)))
    shard_corpus([tmp_path / "r.jsonl"], tmp_path / "out", settings, show_progress=False)
    (dropped,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert dropped["reason"] == "template cannot render it"
    assert re.search(IN_TEMPLATE[attack], dropped["detail"]), dropped["detail"]


def tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "tokenizer_config.json", **changes)


def template(source: str) -> Callable[[Path], None]:
    return tokenizer_config(chat_template=source)


TOKENIZER_ATTACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a template that hangs": (template(HANG + CHATML), "took longer than 0.5 seconds"),
    "a constant power": (template("{{ 9 ** 64 ** 64 ** 64 }}" + CHATML), "OverflowError"),
    "a deep template": (template("{{ " + "(" * 9000 + ")" * 9000 + " }}"), "is not valid Jinja"),
    "many nested loops": (
        template("{% for a in x %}" * 300 + "{% endfor %}" * 300),
        "is not valid Jinja|cannot render",
    ),
    "a template of no type": (tokenizer_config(chat_template={"a": 1}), "damaged: chat_template"),
    "a template of odd entries": (tokenizer_config(chat_template=[3]), "damaged: chat_template"),
    "a token of no type": (tokenizer_config(eos_token=["a"]), "damaged: eos_token"),
    "a list as config": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "is damaged"),
    "a deep config": (lambda d: (d / "tokenizer_config.json").write_text('{"a":' * 99_999), "not valid JSON"),
    "a FIFO as config": (lambda d: os.mkfifo(d / "special_tokens_map.json"), "it is a FIFO, not a file"),
    "a template that is not UTF-8": (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    "a FIFO as template": (lambda d: os.mkfifo(d / "chat_template.jinja"), "it is a FIFO, not a file"),
    "a FIFO as tokenizer": (fifo("tokenizer.json"), "no tokenizer at"),
    "a damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text('{"model": 1}'),
        "cannot be read as a tokenizer",
    ),
    "a tokenizer that is not UTF-8": (
        lambda d: (d / "tokenizer.json").write_bytes(b"\xff"),
        "cannot be read as a tokenizer",
    ),
}


@pytest.mark.parametrize("attack", TOKENIZER_ATTACKS)
def test_a_malicious_tokenizer_is_refused(attack: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(template_engine, "_SECONDS", 0.5)
    apply, message = TOKENIZER_ATTACKS[attack]
    directory = tiny.hf_tokenizer(tmp_path / "t")
    apply(directory)
    with pytest.raises(DataError, match=message):
        ChatTemplate(load_tokenizer(directory))
