"""The layouts of records that public corpora use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iwsft.cli import main as cli
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.messages import Dropped
from megatron_iwsft.data.prepare.records import PRESETS, RecordFormat, RecordReader, parse
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from tests.support import tiny

AUTO, ALL = RecordFormat(), Curation()


def read(record: dict, record_format: RecordFormat = AUTO, **more) -> list:
    return RecordReader(record_format, **more).read(record)


def texts(record: dict, record_format: RecordFormat = AUTO, **more) -> list[tuple]:
    samples = read(record, record_format, **more)
    return [(s.conversation.shape, s.conversation.texts) for s in samples if not isinstance(s, Dropped)]


def test_a_byte_order_mark_is_read_over() -> None:
    assert parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_numbers_are_read_as_they_are_or_not_at_all() -> None:
    """orjson rounds integers of more than 64 bits; the standard library makes Infinity of what is too large for a float."""
    long = 2**100 + 1
    call = b'"tool_calls": [{"function": {"name": "f", "arguments": {"x": %d}}}]'
    record = parse(b'{"messages": [{"role": "assistant", ' + call % long + b"}]}")
    assert record["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"x": long}
    assert RecordReader(AUTO).read(parse(b'{"id": %d}' % long))[0].id == str(long)
    with pytest.raises(Dropped, match="not JSON") as error:
        parse(b'{"x": 1e999}')
    assert error.value.detail == "the number 1e999 is too large"


def test_tool_definitions_may_be_json_texts_one_by_one() -> None:
    (sample,) = read({"messages": [USER, CHOSEN], "tools": [json.dumps(WEATHER)]})
    assert sample.conversation.tools == [WEATHER]


def test_a_text_is_neither_true_nor_false(tmp_path: Path) -> None:
    record = {"prompt": "p", "response": "r", "correct": "false", "meta": {"cut": "no"}}
    for keep in ("correct", "not meta.cut", "correct and 1"):
        (dropped,) = read(record, keep=keep)
        assert dropped.reason == "keep cannot be evaluated" and "is a text, not true or false" in dropped.detail
    assert texts(record, keep='correct == "false" and len(correct) > 0')


def test_sharegpt_with_a_system_field() -> None:
    record = {"system": "Brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert texts(record) == [(("system", "user", "assistant"), ["Brief.", "a", "b"])]


def test_a_list_of_responses_is_a_sample_each_with_its_verdict_and_its_score() -> None:
    """As OpenR1's generations."""
    record = {
        "problem": "p",
        "generations": ["a", "b", "c"],
        "correctness_math_verify": [True, False, True],
        "messages": [],
    }
    samples = read(record, PRESETS["openr1"])
    assert [(s.conversation.texts[1], s.score, s.number) for s in samples] == [("a", 1, 0), ("b", 0, 1), ("c", 1, 2)]
    kept = read(record, PRESETS["openr1"], keep="correctness_math_verify")
    assert [s.reason if isinstance(s, Dropped) else s.conversation.texts[1] for s in kept] == ["a", "not to keep", "c"]
    short = read({**record, "correctness_math_verify": [True]}, PRESETS["openr1"])
    assert {s.reason for s in short} == {"lists of different lengths"}


def test_a_prompt_of_messages_and_a_response() -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    assert texts({"prompt": prompt, "response": "r"}) == [(("system", "user", "assistant"), ["s", "p", "r"])]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "c"}]},
        {"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
        {"chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
    ],
)
def test_preference_data_gives_the_chosen_answers(record: dict) -> None:
    assert texts(record, PRESETS["preference"]) == [(("user", "assistant"), ["p", "c"])]


HUMAN = {"role": None, "from": "human", "value": "p"}
USER, CHOSEN = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
DIFFERENT = "different values under keys that mean the same"
WITH_SYSTEM = ["system", "s", "user", "p", "assistant", "c"]
THOUGHTS = RecordFormat(reasoning_fields=("thought",), answer_prefix="Answer: ", strip=True)


@pytest.mark.parametrize(
    ("record", "record_format", "expected"),
    [
        ({"system": "s", "messages": [USER, CHOSEN]}, AUTO, WITH_SYSTEM),
        ({"system": "s", "prompt": "p", "response": "c"}, AUTO, WITH_SYSTEM),
        ({"system": "s", "messages": [{"role": "system", "content": "s"}, USER, CHOSEN]}, AUTO, WITH_SYSTEM),
        ({"system": "s", "prompt": "p", "chosen": [CHOSEN]}, PRESETS["preference"], WITH_SYSTEM),
        ({"prompt": "p", "chosen": [{"role": "model", "content": "c"}]}, PRESETS["preference"], ["user", "p", "assistant", "c"]),
        ({"prompt": [USER], "response": "c ", "thought": " t "}, THOUGHTS, ["user", "p", "assistant", "t", "content", "Answer: c"]),
        ({"prompt": "p", "response": [{**CHOSEN, "reasoning": " t "}], "thought": "t"}, THOUGHTS, DIFFERENT),
        ({"prompt": "p", "chosen": [{"role": "user", "content": "q"}, CHOSEN]}, PRESETS["preference"], "prompt is not in the conversation"),
        ({"prompt": "p", "response": "c", "tools": ["weather"]}, AUTO, "tools is not a list"),
        ({"prompt": "p", "response": "c", "functions": [{"name": "weather"}]}, AUTO, "tool definitions under functions"),
        ({"system": "s", "messages": [{"role": "system", "content": "x"}, USER, CHOSEN]}, AUTO, "two system prompts"),
        ({"messages": [USER, {**CHOSEN, "reasoning": "a", "thinking": "b"}]}, AUTO, DIFFERENT),
        ({"messages": [USER, {**CHOSEN, "value": "d"}]}, AUTO, DIFFERENT),
        ({"messages": [USER, {**CHOSEN, "function_call": "look"}]}, AUTO, "tool call is not JSON"),
        ({"messages": [{**USER, "reasoning_content": "r"}, CHOSEN]}, AUTO, "reasoning of another role"),
        ({"messages": [USER, {**CHOSEN, "tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}]}, AUTO, "tool call without a name"),
        ({"messages": [{"role": "user", "content": [{"text": "p", "image": "x.png"}]}, CHOSEN]}, AUTO, "content is not text"),
        ({"messages": [USER, CHOSEN], "images": ["x.png"]}, AUTO, "content is not text"),
        ({"messages": [USER, CHOSEN], "images": [], "input": " p", "thinking": True}, AUTO, ["user", "p", "assistant", "c"]),
        *(
            ({"prompt": "p", "response": "c", key: value}, AUTO, "text in a field that is not read")
            for key, value in (("input", "i"), ("reasoning", "t"), ("system_prompt", "s"), ("history", [["q", "a"]]), ("context", {"x": 1}))
        ),
        ({"messages": [USER, CHOSEN], "conversations": [{"from": "human", "value": "q"}]}, AUTO, DIFFERENT),
        ({"messages": [USER, CHOSEN], "conversations": [USER, CHOSEN]}, AUTO, ["user", "p", "assistant", "c"]),
        ({"messages": [USER, CHOSEN], "chat_template_kwargs": {"tools": []}}, AUTO, "chat_template_kwargs has messages or tools"),
        ({"prompt": "p", "response": "c", "input": "i"}, RecordFormat(ignored_keys=("input",)), ["user", "p", "assistant", "c"]),
        *(
            ({"prompt": p, "response": r, "input": i}, AUTO, "text in a field that is not read")
            for p, r, i in (("Which animal?", "A cat.", "cat"), ("Add 15.", "20", "5"), ("Concatenate.", "ab", "cat"))
        ),
        ({"prompt": "Add 15 and 5.", "response": "20", "input": " 5 "}, AUTO, ["user", "Add 15 and 5.", "assistant", "20"]),
        ({"messages": [USER, CHOSEN, USER], "response": "d"}, AUTO, "text in a field that is not read"),
        ({"messages": [USER, CHOSEN], "response": "c"}, AUTO, ["user", "p", "assistant", "c"]),
        ({"messages": json.dumps([USER, CHOSEN]), "tools": ""}, AUTO, ["user", "p", "assistant", "c"]),
        ({"messages": "p"}, AUTO, "messages is not a list"),
        ({"messages": None, "conversations": [HUMAN, CHOSEN]}, AUTO, ["user", "p", "assistant", "c"]),
        ({"messages": None, "prompt": "p", "response": "c"}, AUTO, ["user", "p", "assistant", "c"]),
        ({"messages": [USER, {**CHOSEN, "tool_calls": "[]"}]}, AUTO, ["user", "p", "assistant", "c"]),
        *(
            ({"messages": [USER, {**CHOSEN, "content": [part]}]}, AUTO, reason)
            for part, reason in (
                ({"type": "text", "text": "c", "train": False}, "training flag on a part of a message"),
                ({"type": "thinking", "thinking": "t"}, "message without text"),
            )
        ),
        *(
            ({"messages": [USER, {**CHOSEN, "weight": weight}]}, AUTO, "training flag is not a number")
            for weight in (10**400, 1e39, 1e-50, float("nan"), -1, "1")
        ),
        *(
            ({"messages": [USER, {**CHOSEN, key: ["x"]}]}, AUTO, "text under a key that is not read")
            for key in ("functions", "reasoning_details", "tool_plan", "thought")
        ),
    ],
)  # fmt: skip
def test_what_a_record_says_is_read_or_the_record_is_dropped(
    record: dict, record_format: RecordFormat, expected: list[str] | str
) -> None:
    (sample,) = read(record, record_format)
    if isinstance(expected, str):
        assert isinstance(sample, Dropped) and sample.reason == expected
    else:
        pairs = zip(sample.conversation.shape, sample.conversation.texts, strict=True)
        assert [part for pair in pairs for part in pair] == expected


@pytest.mark.parametrize("prompt", ["p", [USER]])
def test_tools_and_template_variables_are_read_beside_a_prompt_too(prompt: object) -> None:
    more = {"tools": [WEATHER], "chat_template_kwargs": {"thinking": False}}
    (sample,) = read({"prompt": prompt, "response": "c", **more})
    assert (sample.conversation.tools, sample.conversation.options) == tuple(more.values())
    assert list(sample.conversation.messages) == [USER, CHOSEN]


def test_a_function_call_as_json_text_is_a_tool_call() -> None:
    text = '{"name": "weather", "arguments": {}}'
    (sample,) = read({"messages": [USER, {**CHOSEN, "function_call": text}]})
    assert sample.conversation.messages[1] == {**CHOSEN, "tool_calls": [CALL]}


def test_openthoughts_answers_are_taken_apart_at_their_tags() -> None:
    answer = "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n42\n\n<|end_of_solution|>"
    record = {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": answer}]}
    assert texts(record, PRESETS["openthoughts"]) == [
        (("system", "user", "assistant", "content"), ["s", "q", "hm", "42"])
    ]
    record["conversations"][1]["value"] = answer[:-5]
    (dropped,) = read(record, PRESETS["openthoughts"])
    assert dropped.reason == "reasoning tags are incomplete"


def test_s1k_is_read_as_its_authors_tokenized_it() -> None:
    record = {"question": " q ", "deepseek_thinking_trajectory": "\nt\n", "deepseek_attempt": "a\n"}
    assert texts(record, PRESETS["s1k-1.1"]) == [(("user", "assistant", "content"), [" q ", "t", "Answer: a"])]
    record["deepseek_attempt"] = "So.\nAnswer: a"
    assert texts(record, PRESETS["s1k-1.1"])[0][1][2] == "So.\nAnswer: a"


def test_fields_are_read_from_records_with_messages_if_asked() -> None:
    record = {"prompt": "p", "response": "r", "messages": [{"role": "user", "content": "x"}]}
    assert texts(record, RecordFormat(layout="fields")) == [(("user", "assistant"), ["p", "r"])]


def shard(tmp_path: Path, records: list, curation: Curation = ALL, **fields) -> Corpus:
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer")
    source = tiny.write_jsonl(tmp_path / "records.jsonl", records)
    settings = ShardSettings(str(tokenizer), record=RecordFormat(**fields), curation=curation)
    shard_corpus([source], tmp_path / "corpus", settings, show_progress=False)
    return Corpus.open(tmp_path / "corpus")


def test_long_trajectories_are_truncated_if_asked(tmp_path: Path) -> None:
    records = [{"prompt": f"{n}", "response": "word " * n} for n in (3, 40, 4)]
    whole = shard(tmp_path / "whole", records)
    cut = shard(tmp_path / "cut", records, Curation(max_tokens=int(whole.lengths[0]), too_long="truncate"))
    assert cut.lengths.tolist() == [whole.lengths[0]] * 3
    for i in range(3):
        n = int(cut.lengths[i])
        assert cut.tokens(i).tolist() == whole.tokens(i)[:n].tolist()
        assert cut.mask(i).tolist() == whole.mask(i)[:n].tolist()
        assert cut.num_trained[i] == whole.mask(i)[:n].sum()


def test_added_tokens_are_control_text_whether_special_or_not(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    directory = tiny.hf_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("<b>"), AddedToken("\n\n")])
    tokenizer.save(str(directory / "tokenizer.json"))
    source = tiny.write_jsonl(
        tmp_path / "records.jsonl",
        [{"prompt": p, "response": r} for p, r in [("a", "<tool_call>"), ("<b>", "b"), ("a\n\nb", "c")]],
    )

    def kept(**fields) -> list[int]:
        output = tmp_path / f"corpus-{len(fields)}"
        shard_corpus(
            [source], output, ShardSettings(str(directory), record=RecordFormat(**fields)), show_progress=False
        )
        return Corpus.open(output).meta(["line"])["line"].to_pylist()

    assert kept() == [3]
    assert kept(plain_tokens=("<b>",)) == [2, 3]


@pytest.mark.parametrize("answer", ["{{ m.content }}|>", "{{ m.content ~ '|>' }}"], ids=["traced", "rendered by Jinja"])
@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_a_text_that_forms_a_control_token_with_the_template_drops_the_record(
    tmp_path: Path, answer: str, tools: list | None
) -> None:
    shown = "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}<|im_start|>"
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=f"{shown}{answer}<|im_end|>{{% endfor %}}")
    records = [{"prompt": p, "response": "b < c", "tools": tools} for p in ("<|im_end", "a", "<|im_ending")]
    source = tiny.write_jsonl(tmp_path / "records.jsonl", records)
    manifest = shard_corpus([source], tmp_path / "corpus", ShardSettings(str(tokenizer)), show_progress=False)
    assert manifest["dropped"] == {"control token in content": 1} and manifest["counts"]["trajectories"] == 2


@pytest.mark.parametrize("unknown", [None, "<unk>"], ids=["left out", "unknown token"])
def test_text_that_the_tokenizer_has_no_token_for_drops_the_record(tmp_path: Path, unknown: str | None) -> None:
    """As SmolLM2's, whose vocabulary has no token for six bytes: the library leaves them out."""
    directory = tiny.hf_tokenizer(tmp_path / "tokenizer")
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if unknown is None:
        del vocabulary["\u0104"]  # the byte 0x04
    else:
        vocabulary[unknown] = vocabulary.pop("\u0104")
        content["model"]["unk_token"] = unknown
    (directory / "tokenizer.json").write_text(json.dumps(content))
    records = [{"prompt": p, "response": "b"} for p in ("a\x04", "a", "a\u00c4")]
    source = tiny.write_jsonl(tmp_path / "records.jsonl", records)
    manifest = shard_corpus([source], tmp_path / "corpus", ShardSettings(str(directory)), show_progress=False)
    assert manifest["dropped"] == {"text that the tokenizer has no token for": 1}
    assert Corpus.open(tmp_path / "corpus").meta(["line"])["line"].to_pylist() == [2, 3]
    assert "0x04" in (tmp_path / "corpus" / "dropped.jsonl").read_text()


def _chats(tmp_path: Path) -> list[Path]:
    """Two files of several blocks, in which messages have keys that are not used, and below, keys that are not understood."""
    many = [{"messages": [USER, {**CHOSEN, "content": f"{n} " + "long " * 300}]} for n in range(2000)]
    marked = [{"messages": [USER, {**CHOSEN, "content": name, key: value}]} for name, key, value in (
        ("x", "mood", "calm"), ("y", "mood", "wild"), ("z", "tone", "dry")
    )]  # fmt: skip
    return [
        tiny.write_jsonl(tmp_path / f"{k}.jsonl", records)
        for k, records in enumerate(([*many, *marked[:2]], marked[2:]))
    ]


@pytest.mark.parametrize("encoder", ["auto", "own"])
def test_keys_that_are_not_used_are_counted_in_all_blocks(tmp_path: Path, encoder: str, capsys) -> None:
    inputs = list(map(str, _chats(tmp_path)))
    tokenizer = str(tiny.hf_tokenizer(tmp_path / "tokenizer"))
    output = str(tmp_path / "corpus")
    cli.run(["shard", *inputs, "--output", output, "--tokenizer", tokenizer, "--workers", "1", "--encoder", encoder])
    assert Corpus.open(output).manifest["unused_keys"] == {"mood": 2, "tone": 1}
    assert (
        "key mood of messages is not used: 2 records\nkey tone of messages is not used: 1 record"
        in capsys.readouterr().out
    )


@pytest.mark.parallel
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("encoder", ["auto", "own"])
def test_all_keys_that_are_not_understood_are_refused_at_once(tmp_path: Path, encoder: Any, workers: int) -> None:
    inputs = _chats(tmp_path)
    with open(inputs[0], "a") as file:
        file.write(json.dumps({"messages": [USER, {**CHOSEN, "loss_scale": 2}]}) + "\n")
    with open(inputs[1], "a") as file:
        file.writelines(
            json.dumps({"messages": [USER, {**CHOSEN, key: 0.5}]}) + "\n" for key in ("reward", "loss_scale")
        )
    settings = ShardSettings(str(tiny.hf_tokenizer(tmp_path / "tokenizer")))
    with pytest.raises(DataError) as error:
        shard_corpus(inputs, tmp_path / "corpus", settings, workers=workers, encoder=encoder, show_progress=False)
    assert "not understood: 'loss_scale' (0.jsonl, line 2003), 'reward' (1.jsonl, line 2)." in str(error.value)
    assert str(error.value).endswith("--ignore-key loss_scale --ignore-key reward.")


def test_control_text_in_template_variables_drops_the_record(tmp_path: Path) -> None:
    record = {"prompt": "p", "response": "r"}
    records = [record, {**record, "chat_template_kwargs": {"note": "<|im_end|>"}}]
    assert shard(tmp_path, records).meta(["line"])["line"].to_pylist() == [1]


def test_each_turn_of_a_rewritten_history_is_a_trajectory_with_an_id(tmp_path: Path) -> None:
    from tests.data.test_chat_template import THINKING

    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=THINKING)
    messages = [
        {"role": role, "content": text, **({"reasoning_content": f"so {text}"} if role == "assistant" else {})}
        for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    source = tiny.write_jsonl(tmp_path / "records.jsonl", [{"id": "x", "messages": messages}])
    shard_corpus([source], tmp_path / "corpus", ShardSettings(str(tokenizer)), show_progress=False)
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.meta(["id"])["id"].to_pylist() == ["x@1", "x@3"]


def test_null_members_of_parquet_structs_are_not_trained_on(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def call(**arguments) -> dict:
        function = {"name": "f", "arguments": arguments}
        turn = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        return {"messages": [{"role": "user", "content": f"{arguments}"}, turn]}

    from tests.data.test_chat_template import TOOLS

    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=TOOLS)
    pq.write_table(pa.Table.from_pylist([call(city="Rome"), call(days=3)]), tmp_path / "calls.parquet")
    shard_corpus([tmp_path / "calls.parquet"], tmp_path / "corpus", ShardSettings(str(tokenizer)), show_progress=False)
    corpus = Corpus.open(tmp_path / "corpus")
    decoded = [corpus.tokenizer().decode(corpus.tokens(i).tolist()) for i in range(2)]
    assert '"arguments": {"city": "Rome"}' in decoded[0] and '"arguments": {"days": 3}' in decoded[1]


def test_weights_of_messages_reach_their_tokens_and_the_batch(tmp_path: Path) -> None:
    from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
    from megatron_iwsft.data.sampler import Quality, Sampler

    def chat(**flags) -> dict:
        turns = [
            ("user", "a"),
            ("assistant", "one two"),
            ("user", "b"),
            ("assistant", "three"),
            ("user", "c"),
            ("assistant", "4"),
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        for name, value in flags.items():
            messages[int(name[1:])]["weight"] = value
        return {"messages": messages}

    corpus = shard(tmp_path, [chat(), chat(m1=0.25, m3=0), chat(m5=2)])
    weights = {i: corpus.index.turn_weights(i) for i in range(len(corpus))}
    assert {i: w.tolist() for i, w in weights.items() if w is not None} == {1: [0.25, 1.0], 2: [1.0, 1.0, 2.0]}
    for i, expected in ((1, [0.25, 1.0]), (2, [1.0, 1.0, 2.0])):
        weights = corpus.token_weights(i)
        assert (weights > 0).tolist() == (corpus.mask(i) == 1).tolist()
        runs = [float(w) for w, before in zip(weights, [0, *weights], strict=False) if w and not before]
        assert runs == expected
    assert corpus.token_weights(0) is None
    settings = dict(seq_length=128, packing="none", global_batch_size=3, quality=Quality(), seed=0)
    sampler = Sampler(corpus.lengths, corpus.scores, **settings)
    packs = [np.asarray([i]) for i in range(3)]
    (batch,) = BatchBuilder(corpus, sampler, RowShape(1, 1, None), micro_batch_size=3).from_packs(packs)
    found = batch.turn_weights[batch.labels[0] != -100].tolist()
    expected = [w for i in range(3) for w in _trained_weights(corpus, i)]
    assert found == expected


def _trained_weights(corpus: Corpus, i: int) -> list[float]:
    weights = corpus.token_weights(i)
    mask = corpus.mask(i) == 1
    return [1.0] * int(mask.sum()) if weights is None else weights[mask].tolist()


def test_turns_of_different_weights_need_text_between_them(tmp_path: Path) -> None:
    tokenizer = tiny.hf_tokenizer(
        tmp_path / "tokenizer", template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}] + [
        {"role": "assistant", "content": c, "weight": w} for c, w in (("b", 1), ("c", 0.5))
    ]
    source = tiny.write_jsonl(tmp_path / "records.jsonl", [{"messages": messages}, {"prompt": "p", "response": "r"}])
    manifest = shard_corpus([source], tmp_path / "corpus", ShardSettings(str(tokenizer)), show_progress=False)
    assert manifest["dropped"] == {"turns of different weights touch": 1}
