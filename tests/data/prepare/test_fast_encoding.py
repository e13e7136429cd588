"""gigatoken is used only where it gives the same ids as the tokenizer's own library."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare import fast_encoding
from megatron_iwsft.data.prepare.fast_encoding import CheckedEncoder, choose_encoder, gigatoken_encoder
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny

ALPHABET = "ab eé\u0301ß 12.,\n\t雪😀\u200d<|>_ÀZ'’"


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "bpe":
        return load_tokenizer(tiny.hf_tokenizer(directory))
    return load_tokenizer(tiny.sentencepiece_model(directory / "spm.model"))


def pieces(tokenizer: Tokenizer, n: int) -> tuple[list[str], list[int]]:
    """n random texts in pieces, some of which begin or end with a special token."""
    rng = np.random.default_rng(0)
    special = sorted(tokenizer.special)
    texts, counts = [], []
    for _ in range(n):
        count = int(rng.integers(1, 5))
        for _ in range(count):
            text = "".join(rng.choice(list(ALPHABET), rng.integers(0, 40)))
            texts.append(f"{rng.choice([*special, ''])}{text}{rng.choice([*special, ''])}")
        counts.append(count)
    return texts, counts


def test_gigatoken_gives_the_ids_of_the_tokenizers_own_library(tokenizer: Tokenizer) -> None:
    texts, counts = pieces(tokenizer, 500)
    encoder = gigatoken_encoder(tokenizer)
    assert not isinstance(encoder, str), encoder
    for found, expected in zip(encoder(texts, counts), tokenizer.encode_batch(texts, counts), strict=True):
        assert np.array_equal(found, expected)
    fast, why = choose_encoder(tokenizer, texts, counts)
    assert fast and "ids equal those of" in why


def test_a_difference_disables_gigatoken_or_stops_the_run(tokenizer: Tokenizer, monkeypatch) -> None:
    texts, counts = pieces(tokenizer, 20)
    encoder = gigatoken_encoder(tokenizer)
    assert not isinstance(encoder, str)

    def wrong(texts, counts):
        ids, lengths = encoder(texts, counts)
        return ids + (np.arange(len(ids)) == len(ids) // 2), lengths

    with monkeypatch.context() as patch:
        patch.setattr(fast_encoding, "gigatoken_encoder", lambda _: wrong)
        fast, why = choose_encoder(tokenizer, texts, counts)
        assert not fast and "gives different ids, for example for" in why
    monkeypatch.setattr(fast_encoding, "_CHECK_EVERY", 1)
    CheckedEncoder(tokenizer, encoder)(texts, counts)
    with pytest.raises(DataError, match="again with --encoder own --restart"):
        CheckedEncoder(tokenizer, wrong)(texts, counts)


def test_a_tokenizer_that_gigatoken_cannot_read_uses_its_own_library(tmp_path: Path, caplog) -> None:
    from tokenizers import Regex, pre_tokenizers

    directory = tiny.hf_tokenizer(tmp_path / "tokenizer")
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer["pre_tokenizer"] = json.loads(
        pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]).__getstate__()
    )
    path.write_text(json.dumps(tokenizer))
    source = tiny.write_jsonl(tmp_path / "r.jsonl", [{"prompt": "12 + 30?", "response": "42"}])
    with caplog.at_level(logging.INFO):
        shard_corpus([source], tmp_path / "corpus", ShardSettings(str(directory)), show_progress=False)
    assert "encoding with tokenizers: gigatoken" in caplog.text
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.tokenizer().decode(corpus.tokens(0).tolist()).endswith("42<|im_end|>\n")


def test_both_libraries_give_the_same_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list(ALPHABET.replace("<", "")), 50)) + "x" for _ in range(400)]
    source = tiny.write_jsonl(tmp_path / "r.jsonl", [{"prompt": a, "response": b} for a, b in pairwise(texts)])
    template = None if tokenizer.chat_template else "plain"
    path = tokenizer.files[0] if tokenizer.files[0].suffix == ".model" else tokenizer.files[0].parent
    for encoder in ("auto", "own"):
        shard_corpus(
            [source], tmp_path / encoder, ShardSettings(str(path), template), encoder=encoder, show_progress=False
        )
    assert all(
        (tmp_path / "auto" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
        for name in ("manifest.json", "shard-00000.bin", "shard-00000.mask.bin")
    )


def test_texts_with_marks_of_newer_unicode_versions_get_the_ids_of_the_tokenizer(tmp_path: Path) -> None:
    """Normalisation to NFC reorders and composes combining marks, by tables that differ between the libraries."""
    directory = tiny.hf_tokenizer(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    tokenizer = load_tokenizer(directory)
    encoder = gigatoken_encoder(tokenizer)
    assert not isinstance(encoder, str), encoder
    letters = [c for c in range(0x300, 0x1F000) if not 0x3400 <= c < 0xA000 and not 0xAC00 <= c < 0xF900]
    texts = [f"e{chr(c)}\u0323\u0301 x" for c in letters]
    for low, high in (
        (0x105C0, 0x10600),
        (0x11380, 0x11400),
        (0x11900, 0x11960),
        (0x16100, 0x16140),
        (0x16D40, 0x16D80),
    ):
        texts += [f"x{chr(a)}{chr(b)}" for a in range(low, high) for b in (*range(low, high), 0x307)]
    counts = [1] * len(texts)
    for found, expected in zip(encoder(texts, counts), tokenizer.encode_batch(texts, counts), strict=True):
        assert np.array_equal(found, expected)
    slow = sum(bool(fast_encoding._NEWER_MARKS.search(text)) for text in texts[: len(letters)])
    assert 150 < slow < 1000, "only few characters may take the slow way"


def test_with_other_versions_of_the_libraries_every_mark_takes_the_slow_way(monkeypatch) -> None:
    differs = fast_encoding._may_differ()
    assert differs("e\u0897") and not differs("e\u0301 \u00e9 雪")
    monkeypatch.setattr(fast_encoding, "_COMPARED", {"gigatoken": "0.10.0", "tokenizers": "0.21.0"})
    differs = fast_encoding._may_differ()
    assert differs("e\u0897") and differs("e\u0301") and differs("\U00016d67") and differs("\u0378")
    assert not differs("\u00e9 雪")
