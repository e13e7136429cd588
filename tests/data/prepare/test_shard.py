"""Building a corpus directory from records, with both kinds of tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    return tiny.hf_tokenizer(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Path:
    return tiny.sentencepiece_model(tmp_path_factory.mktemp("sp") / "spm.model")


def chat(*turns: str) -> dict:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def shard(
    tmp_path: Path,
    records: list,
    tokenizer: Path,
    *,
    template: str | None = None,
    workers: int = 1,
    shard_tokens=100_000,
    curation: Curation = Curation(),  # noqa: B008
    **fmt,
) -> Corpus:
    source = tiny.write_jsonl(tmp_path / "records.jsonl", records) if records else tmp_path / "records.jsonl"
    settings = ShardSettings(str(tokenizer), template, RecordFormat(**fmt), shard_tokens, curation)
    shard_corpus([source], tmp_path / "corpus", settings, workers=workers, show_progress=False)
    return Corpus.open(tmp_path / "corpus")


def dropped(corpus: Corpus) -> list[dict]:
    return [json.loads(line) for line in (corpus.directory / "dropped.jsonl").read_text().splitlines()]


def test_the_answer_and_its_end_of_turn_token_are_trained_on(tmp_path: Path, bpe: Path) -> None:
    corpus = shard(tmp_path, [chat("What is 7 + 8?", "15.", "Double it.", " 30 ")], bpe)
    tokenizer = load_tokenizer(bpe)
    tokens, mask = corpus.tokens(0), corpus.mask(0)
    assert tokenizer.decode(tokens.tolist()) == (
        "<|im_start|>user\nWhat is 7 + 8?<|im_end|>\n<|im_start|>assistant\n15.<|im_end|>\n"
        "<|im_start|>user\nDouble it.<|im_end|>\n<|im_start|>assistant\n 30 <|im_end|>\n"
    )
    assert tokenizer.decode(tokens[mask == 1].tolist()) == "15.<|im_end|> 30 <|im_end|>"


def test_prompt_and_response_pairs_with_sentencepiece(tmp_path: Path, sentencepiece: Path) -> None:
    records = [{"question": "What is 7 + 8?", "answer": {"text": "It is 15.\nDone.", "right": True}}]
    corpus = shard(
        tmp_path,
        records,
        sentencepiece,
        template="plain",
        prompt_field="question",
        response_fields=("answer.text",),
        score_fields=("answer.right",),
    )
    tokenizer = load_tokenizer(sentencepiece)
    tokens, mask = corpus.tokens(0), corpus.mask(0)
    assert tokenizer.decode(tokens.tolist()) == "<s>Question: What is 7 + 8?\nAnswer: It is 15.\nDone.</s>"
    assert tokenizer.decode(tokens[mask == 1].tolist()).strip() == "It is 15.\nDone.</s>"
    assert corpus.scores[0] == 1.0


def test_a_tokenizer_that_adds_a_leading_space_adds_it_only_once_per_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.train_from_iterator(
        tiny.TEXTS, trainers.BpeTrainer(special_tokens=["</s>"], vocab_size=90, show_progress=False)
    )
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    corpus = shard(tmp_path, [{"prompt": "Add 7 and 8", "response": "15 is it"}], tmp_path, template="plain")
    full = own.encode("Question: Add 7 and 8\nAnswer: 15 is it</s>")
    assert corpus.tokens(0).tolist() == full.ids
    trained = [full.tokens[i] for i in np.flatnonzero(corpus.mask(0))]
    assert "".join(trained) == "▁15▁is▁it</s>"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_ids_equal_those_of_the_tokenizers_own_library(tmp_path: Path, kind: str, request) -> None:
    path = request.getfixturevalue(kind)
    texts = ["Zug fährt 120 km", "double it → 30 😀", "tabs\tand  spaces", "ends in space "]
    corpus = shard(
        tmp_path,
        [{"prompt": t, "response": t + "?"} for t in texts],
        path,
        template="plain" if kind == "sentencepiece" else None,
    )
    for i, text in enumerate(texts):
        if kind == "sentencepiece":
            import sentencepiece as sp

            own = sp.SentencePieceProcessor(model_file=str(path))
            expected = [own.bos_id(), *own.encode(f"Question: {text}\nAnswer: {text}?"), own.eos_id()]
        else:
            import tokenizers

            own = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            expected = own.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}?<|im_end|>\n").ids
        assert corpus.tokens(i).tolist() == expected


def test_a_template_without_generation_prompt_is_masked_by_content(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=template)
    corpus = shard(tmp_path, [chat("Hi", "Hello", "Bye", "See you")], tokenizer)
    trained = corpus.tokens(0)[corpus.mask(0) == 1].tolist()
    assert load_tokenizer(tokenizer).decode(trained) == "Hello<|im_end|>See you<|im_end|>"


def test_a_template_that_rewrites_history_drops_the_record(tmp_path: Path) -> None:
    template = PRESETS["chatml"].replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'x' }}")
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=template)
    corpus = shard(tmp_path, [chat("Hi", "Hello", "Bye", "See you"), chat("Hi", "Hello")], tokenizer)
    assert len(corpus) == 1
    assert dropped(corpus)[0]["reason"] == "text is missing in the rendering"
    assert dropped(corpus)[0]["detail"].startswith(
        "the template leaves out or changes the content of turn 1 (assistant)"
    )


BAD_RECORDS = {
    '{"messages": [': "not JSON",
    "[1, 2]": "not a JSON object",
    '{"prompt": "a"}': "missing field",
    '{"prompt": "a", "response": 3}': "field is not text",
    '{"prompt": "a", "response": "  "}': "empty response",
    '{"prompt": " ", "response": "b"}': "empty prompt",
    '{"prompt": "a", "response": "b<|im_end|>"}': "control token in content",
    '{"prompt": "\\ud800", "response": "b"}': "not valid Unicode",
    '{"messages": [{"role": "robot", "content": "a"}]}': "message without a known role",
    '{"messages": [{"role": "user", "content": null}]}': "message without text",
    '{"messages": [{"role": ["user"], "content": "a"}]}': "message without a known role",
    '{"messages": []}': "messages is not a list",
    '{"messages": [{"role": "user", "content": "a"}]}': "no turn to train on",
    '{"input_ids": [1, 2], "loss_mask": [1]}': "input_ids and loss_mask differ in length",
    '{"input_ids": [1, 2], "loss_mask": [1, 1]}': "no prompt",
    '{"input_ids": [1, 2], "loss_mask": [0, 0]}': "nothing to train on",
    '{"input_ids": [1, 99999], "loss_mask": [0, 1]}': "token outside the vocabulary",
    '{"input_ids": [1, "x"], "loss_mask": [0, 1]}': "input_ids is not a list of integers",
}


def test_invalid_records_are_dropped_with_a_reason(tmp_path: Path, bpe: Path) -> None:
    good = json.dumps({"prompt": "a", "response": "b"})
    lines = [good, *BAD_RECORDS, good, "", "\xff"]
    (tmp_path / "records.jsonl").write_bytes("\n".join(lines[:-1]).encode() + b"\n\xff\xfe\n")
    corpus = shard(tmp_path, [], bpe)
    assert len(corpus) == 1
    found = {entry["line"]: entry["reason"] for entry in dropped(corpus)}
    expected = dict(enumerate(BAD_RECORDS.values(), 2))
    n = len(expected)
    assert found == expected | {n + 2: "duplicate", n + 4: "not UTF-8"}
    counts = corpus.manifest["counts"]
    assert counts["trajectories"] + counts["dropped"] == n + 3


def test_records_are_dropped_by_score_and_length(tmp_path: Path, bpe: Path) -> None:
    records = [
        {"prompt": f"p{i}", "response": "r" * 8 ** (i // 4 + 1), "good": [True, 0.4, "high", 1, 2.5][i]}
        for i in range(5)
    ]
    corpus = shard(tmp_path, records, bpe, score_fields=("good",), curation=Curation(min_score=0.5, max_tokens=60))
    assert corpus.scores.tolist() == [1.0, 1.0]
    assert [d["reason"] for d in dropped(corpus)] == ["score too low", "score is not a number", "too long"]


def test_each_response_field_gives_a_trajectory(tmp_path: Path, bpe: Path) -> None:
    records = [{"q": "1+1", "a": {"s": "2", "ok": True}, "b": {"s": "3", "ok": False}}]
    corpus = shard(
        tmp_path, records, bpe, prompt_field="q", response_fields=("a.s", "b.s"), score_fields=("a.ok", "b.ok")
    )
    assert corpus.scores.tolist() == [1.0, 0.0]
    assert corpus.meta(["id"])["id"].to_pylist() == ["records:1#0", "records:1#1"]


@pytest.mark.parallel
def test_the_corpus_is_byte_identical_for_any_number_of_workers(tmp_path: Path, bpe: Path) -> None:
    records = [{"prompt": f"What is {i} + {i % 50}?", "response": f"{i + i % 50}"} for i in range(1500)]
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        shard(tmp_path / str(workers), records, bpe, workers=workers, shard_tokens=20_000)
    one, three = (sorted(p for p in (tmp_path / w / "corpus").rglob("*") if p.is_file()) for w in ("1", "3"))
    assert [p.name for p in one] == [p.name for p in three]
    assert sum(p.name.endswith(".meta.parquet") for p in one) >= 2
    for a, b in zip(one, three, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_an_interrupted_run_continues_after_its_finished_shards(tmp_path: Path, bpe: Path, monkeypatch) -> None:
    from megatron_iwsft.data.corpus import ShardWriter

    records = [{"prompt": f"What is {i}?", "response": f"{i}"} for i in range(1200)] + ["bad"]
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    shard(uninterrupted, records, bpe, shard_tokens=8_000)
    tiny.write_jsonl(tmp_path / "records.jsonl", records)
    close, closed = ShardWriter.close, []

    def stop_after_two(writer):
        if len(closed) == 2:
            raise KeyboardInterrupt
        closed.append(writer.name)
        return close(writer)

    monkeypatch.setattr(ShardWriter, "close", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        shard(tmp_path, [], bpe, shard_tokens=8_000)
    with pytest.raises(DataError, match="sharding was interrupted"):
        Corpus.open(tmp_path / "corpus")
    monkeypatch.setattr(ShardWriter, "close", lambda w: closed.append(w.name) or close(w))
    shard(tmp_path, [], bpe, shard_tokens=8_000)
    assert len(set(closed)) == len(closed), "a finished shard was written again"
    for path in (uninterrupted / "corpus").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "corpus" / path.relative_to(uninterrupted / "corpus")).read_bytes()


def test_megatrons_own_reader_opens_the_shards(tmp_path: Path, bpe: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    corpus = shard(tmp_path, [{"prompt": f"{i}", "response": "x" * (i + 1)} for i in range(20)], bpe)
    for suffix, ours in (("", corpus.tokens), (".mask", corpus.mask)):
        theirs = IndexedDataset(str(corpus.directory / f"shard-00000{suffix}"))
        assert len(theirs) == len(corpus)
        assert len(theirs.document_indices) == len(corpus) + 1
        for i in range(len(corpus)):
            assert np.array_equal(theirs[i], ours(i))


def test_verify_reports_changed_files(tmp_path: Path, bpe: Path) -> None:
    corpus = shard(tmp_path, [{"prompt": "a", "response": "b"}], bpe)
    assert corpus.damage() == []
    with open(corpus.directory / "shard-00000.bin", "r+b") as file:
        file.write(b"\xff")
    assert corpus.damage() == [f"{corpus.directory}/shard-00000.bin has changed since the manifest was written"]


def test_a_damaged_corpus_is_rejected_with_the_file_name(tmp_path: Path, bpe: Path) -> None:
    corpus = shard(tmp_path, [{"prompt": "a", "response": "b"}], bpe).directory
    with pytest.raises(DataError, match="there is no corpus at"):
        Corpus.open(tmp_path / "nowhere")
    for name, damage, message in [
        ("shard-00000.bin", lambda p: p.write_bytes(p.read_bytes()[:-2]), "but its index says"),
        ("shard-00000.idx", lambda p: p.write_bytes(p.read_bytes()[:20]), "is truncated"),
        ("shard-00000.mask.bin", lambda p: p.unlink(), "is missing"),
        ("shard-00000.meta.parquet", lambda p: p.write_bytes(b"PAR1"), "is damaged"),
        ("manifest.json", lambda p: p.write_text("{"), "is damaged"),
        ("manifest.json", lambda p: p.write_text('{"format_version": 99}'), "has format version 99"),
    ]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(corpus, copy)
        damage(copy / name)
        with pytest.raises(DataError, match=message):
            Corpus.open(copy)


def test_user_errors_are_reported(tmp_path: Path, bpe: Path) -> None:
    records = [{"prompt": "a", "response": "b"}]
    with pytest.raises(DataError, match=r"input file .* does not exist"):
        shard(tmp_path, [], bpe)
    with pytest.raises(DataError, match="no tokenizer at"):
        shard(tmp_path, records, tmp_path / "nothing")
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        shard(tmp_path, records, tiny.hf_tokenizer(tmp_path / "bare", template=None))
    with pytest.raises(DataError, match="there is no template 'x'"):
        shard(tmp_path, records, bpe, template="x")
    with pytest.raises(DataError, match="not valid Jinja"):
        shard(tmp_path, records, tiny.hf_tokenizer(tmp_path / "broken", template="{% for %}"))
    with pytest.raises(DataError, match="does not end an assistant turn with a special token"):
        shard(
            tmp_path,
            records,
            tiny.hf_tokenizer(tmp_path / "endless", template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        )
    with pytest.raises(
        DataError,
        match=r"(?s)no record was kept \(empty response: 1\)\. First entry of .*\"reason\": ?\"empty response\"",
    ):
        shard(tmp_path, [{"prompt": "a", "response": ""}], bpe)
    shutil.rmtree(tmp_path / "corpus")
    shard(tmp_path, records, bpe)
    with pytest.raises(DataError, match="already contains a corpus created from other inputs or settings"):
        shard(tmp_path, records, bpe, shard_tokens=5)
    with pytest.raises(DataError, match="already contains a corpus created from other inputs or settings"):
        shard(tmp_path, [{"prompt": "a", "response": "c"}], bpe)  # the same size, other content
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(DataError, match="is not empty and has no unfinished corpus"):
        shard_corpus([tmp_path / "records.jsonl"], tmp_path / "used", ShardSettings(str(bpe)), show_progress=False)


def test_chat_templates_render_the_same_as_transformers(bpe: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe)
    ours = ChatTemplate(load_tokenizer(bpe))
    messages = chat("Hi\n", " Hello ", "Bye")["messages"]
    for prompt in (False, True):
        assert ours.render(messages, add_generation_prompt=prompt) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
