"""Curation: each filter, its counts in the manifest and its reasons in dropped.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.expressions import MissingField, compile_expression
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.records import PRESETS, RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import run_python, tiny


def shard(
    tmp_path: Path, records: list, curation: Curation, record: RecordFormat | None = None
) -> tuple[Corpus, dict[str, tuple[str, str]]]:
    """The corpus, and (reason, detail) of every dropped record by its id."""
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer")
    source = tiny.write_jsonl(tmp_path / "records.jsonl", records)
    settings = ShardSettings(str(tokenizer), record=record or RecordFormat(), curation=curation)
    shard_corpus([source], tmp_path / "corpus", settings, show_progress=False)
    corpus = Corpus.open(tmp_path / "corpus")
    entries = [json.loads(line) for line in (tmp_path / "corpus" / "dropped.jsonl").read_text().splitlines()]
    assert len(entries) == corpus.manifest["counts"]["dropped"] == sum(corpus.manifest["dropped"].values())
    return corpus, {e["id"]: (e["reason"], e.get("detail", "")) for e in entries}


def ids(corpus: Corpus) -> list[str]:
    return corpus.meta(["id"])["id"].to_pylist()


RECORD = {"judge": 4, "ok": True, "a": {"b": 2}, "c.d": 7, "names": ["x", "y"], "text": "abc", "6b.ok": 1, "none": None}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("judge", 4),
        ("a.b", 2),
        ("c.d", 7),
        ("6b.ok", 1),
        ("judge >= 4 and not ok", False),
        ("0.5 * judge / 5 + 0.5 * ok", 0.9),
        ("1 < a.b <= 2", True),
        ("'x' in names and text != 'z'", True),
        ('field("6b.ok") == 1 or judge', True),
        ("len(text) % 2 - -1", 2),
        ("ok == true", True),
        ("text in ['abc', 'd']", True),
        ("max(judge, a.b) // 3", 1),
        ('field("judge", 0) + field("absent", 3)', 7),
        ('field("a.z", judge) == 4', True),
        ('field("none", "x")', "x"),
        ('has("judge") and has("a.b") and has("6b.ok")', True),
        ('has("absent") or has("none") or has("a.z")', False),
        ('not has("absent") or absent > 3', True),
    ],
)
def test_expressions_evaluate_over_fields(expression: str, value: object) -> None:
    assert compile_expression(expression)(RECORD) == value


@pytest.mark.parametrize(
    "expression",
    ["", "judge >=", "__import__('os')", "a.b()", "judge ** 9", "lambda: 1", "[x for x in names]", "names[0]", "open('x')", "field(a)",
     "has(a)", "has('a', 1)", "field('a', 1, 2)", "has()"],
)  # fmt: skip
def test_invalid_expressions_are_rejected(expression: str) -> None:
    with pytest.raises(DataError, match="is not a valid expression over fields"):
        compile_expression(expression)


def test_a_missing_field_is_reported_by_name() -> None:
    with pytest.raises(MissingField, match=r"a\.z"):
        compile_expression("judge > 3 and a.z")(RECORD)


def test_scores_and_keep_by_expression(tmp_path: Path) -> None:
    records = [
        {"id": "good", "prompt": "a", "response": "b", "judge": 5, "truncated": False},
        {"id": "cut", "prompt": "a", "response": "c", "judge": 5, "truncated": True},
        {"id": "bad", "prompt": "a", "response": "d", "judge": 1, "truncated": False},
        {"id": "odd", "prompt": "a", "response": "e", "judge": "five", "truncated": False},
        {"id": "none", "prompt": "a", "response": "f", "truncated": False},
    ]
    corpus, dropped = shard(
        tmp_path, records, Curation(keep="not truncated", min_score=0.5), RecordFormat(score_fields=("judge / 5",))
    )
    assert ids(corpus) == ["good"]
    assert corpus.scores.tolist() == [1.0]
    assert {k: v[0] for k, v in dropped.items()} == {
        "cut": "not to keep",
        "bad": "score too low",
        "odd": "score is not a number",
        "none": "missing field",
    }


def test_sources_have_separate_scores_and_a_cap(tmp_path: Path) -> None:
    records = [
        {"id": str(i), "prompt": f"{i}?", "response": "b", "from": ["web", "human"][i % 2], "stars": i}
        for i in range(8)
    ]
    record = RecordFormat(source_field="from", score_fields=("stars",), source_scores=(("human", "10"),))
    corpus, dropped = shard(tmp_path, records, Curation(max_per_source=3), record)
    assert dict(zip(ids(corpus), corpus.scores.tolist(), strict=True)) == {
        "0": 0, "1": 10, "2": 2, "3": 10, "4": 4, "5": 10
    }  # fmt: skip
    assert corpus.manifest["sources"] == {"human": 3, "web": 3}
    assert dropped == {
        "6": ("over the cap of its source", "web already has 3"),
        "7": ("over the cap of its source", "human already has 3"),
    }


def test_trajectories_outside_the_length_bounds_are_dropped(tmp_path: Path) -> None:
    records = [{"id": str(n), "prompt": "a", "response": "x" * n} for n in (1, 20, 90)]
    corpus, dropped = shard(tmp_path, records, Curation(min_tokens=25, max_tokens=80))
    assert ids(corpus) == ["20"]
    assert dropped["1"][0] == "too short"
    assert dropped["90"][0] == "too long"


SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix blue potions in old oak barrels"
WORDS = SENTENCE.split()


def test_near_duplicates_are_dropped_and_reported(tmp_path: Path) -> None:
    base = " ".join(WORDS * 5)
    changed = base.replace("wizards", "witches", 1)
    other = " ".join(reversed(WORDS * 5))
    records = [
        {"id": "first", "prompt": base, "response": "yes"},
        {"id": "other", "prompt": other, "response": "yes"},
        {"id": "changed", "prompt": changed, "response": "yes"},
        {"id": "same", "prompt": base, "response": "yes"},
    ]
    corpus, dropped = shard(tmp_path, records, Curation(near_duplicates=0.6))
    assert ids(corpus) == ["first", "other"]
    assert dropped["changed"] == ("near-duplicate", "similar to first")
    assert dropped["same"][0] == "duplicate"


def test_near_duplicates_are_found_above_the_threshold_and_not_below() -> None:
    """Pairs of known similarity: at least 95 % are found well above the threshold, at most 5 % well below."""
    from megatron_iwsft.data.prepare.dedup import NearDuplicates
    from megatron_iwsft.data.prepare.filters import Signatures

    def text(k: int, shared: int, tail: str) -> str:
        return " ".join([f"w{k}x{i}" for i in range(shared)] + [f"{tail}{k}x{i}" for i in range(200 - shared)])

    signatures = Signatures()
    for threshold in (0.5, 0.8):
        found = {}
        for shared, name in ((196, "above"), (90, "below")):  # similarity 0.96 and 0.28 of 5-grams
            index = NearDuplicates(threshold)
            for k in range(100):
                assert index.find_or_add(str(k), signatures([text(k, 200, "a")])[0]) is None
            found[name] = sum(
                index.find_or_add("x", signatures([text(k, shared, "b")])[0]) is not None for k in range(100)
            )
        assert found["above"] >= 95
        assert found["below"] <= 5


def test_near_duplicates_differ_in_more_than_case_punctuation_and_form(tmp_path: Path) -> None:
    chinese = "小明有十二个苹果他把其中的一半分给了小红又从商店里买回来五个请问现在小明一共有多少个苹果"
    records = [
        {"id": "english", "prompt": SENTENCE, "response": "yes"},
        {"id": "shouted", "prompt": SENTENCE.upper().replace(" ", ", "), "response": "Yes!"},
        {"id": "chinese", "prompt": chinese, "response": "十一"},
        {"id": "punctuated", "prompt": f"{chinese[:9]}，{chinese[9:20]}。{chinese[20:]}？", "response": "十一。"},
        {"id": "other", "prompt": chinese[::-1], "response": "十一"},
        {"id": "composed", "prompt": "caf\u00e9 " * 9, "response": "1"},
        {"id": "decomposed", "prompt": "CAFE\u0301 " * 9, "response": "1"},
        {"id": "symbols", "prompt": "∫∫ = ?", "response": "∮"},
        {"id": "symbols too", "prompt": "∫∫ = ??", "response": "∮"},
    ]
    corpus, dropped = shard(tmp_path, records, Curation(near_duplicates=0.7))
    assert ids(corpus) == ["english", "chinese", "other", "composed", "symbols", "symbols too"]
    assert {name: detail for name, (_, detail) in dropped.items()} == {
        "shouted": "similar to english",
        "punctuated": "similar to chinese",
        "decomposed": "similar to composed",
    }
    assert corpus.manifest["unchecked"] == {"no words: not compared with near-duplicates": 2}


def test_leaked_benchmark_problems_are_dropped_and_reported(tmp_path: Path) -> None:
    problems = [{"problem": "too short"}, {"problem": "Find the number of ways to tile a 2 by 10 board with dominoes."}]
    benchmark = tiny.write_jsonl(tmp_path / "aime.jsonl", problems)
    records = [
        {"id": "leak", "prompt": "Please:  find the\nnumber of WAYS to tile a 2 by 12 board", "response": "x"},
        {"id": "near", "prompt": "find the number of ways to tile the 2 by 10 floor", "response": "x"},
        {"id": "answer", "prompt": "say", "response": "find the number of ways to tile a 2 by 10 board"},
    ]
    corpus, dropped = shard(tmp_path, records, Curation(benchmarks=(str(benchmark),)))
    assert ids(corpus) == ["near", "answer"]
    assert dropped == {"leak": ("in a benchmark", "aime.jsonl:2 also has 'find the number of ways to tile a'")}
    (tmp_path / "all").mkdir()
    corpus, dropped = shard(tmp_path / "all", records, Curation(benchmarks=(str(benchmark),), benchmark_texts="all"))
    assert ids(corpus) == ["near"]
    with pytest.raises(DataError, match="a benchmark problem needs one of the fields"):
        tiny.write_jsonl(tmp_path / "aime.jsonl", [{"x": 1}])
        (tmp_path / "again").mkdir()
        shard(tmp_path / "again", records, Curation(benchmarks=(str(benchmark),)))


PROBLEMS = [
    "What is 2 + 2, exactly?",  # 6 words: as a whole
    "Paris?",  # 1 word: only as an entire text
    "∫ = ?",  # no words
    "一个长方形的长是宽的三倍，周长是四十八厘米，求它的面积。",
    "鸡兔同笼，求鸡的个数",  # shorter than 16 characters: as a whole
    "จงหาผลบวกของจำนวนเต็มบวกทั้งหมดที่น้อยกว่าหนึ่งร้อย",
    "Найдите сумму всех натуральных чисел, меньших ста тысяч.",
    "La médiane d\u2019un triangle coupe le côté opposé en son milieu.",
]
PROMPTS = [
    ("Tell me: what is 2+2 EXACTLY", "1"),
    ("what is 2 + 2", None),
    ("paris!", "2"),
    ("Paris is where?", None),
    ("∫ = ?", None),
    ("请回答：一个长方形的长是宽的三倍,周长是四十八厘米", "4"),
    ("一个长方形的宽是长的一半，周长是十厘米", None),
    ("问题：鸡兔同笼求鸡的个数。谢谢", "5"),
    ("จงหาผลบวกของจำนวนเต็มบวกทั้งหมด ที่น้อยกว่า 50", "6"),
    ("НАЙДИТЕ сумму всех (натуральных) чисел — меньших ста", None),
    ("НАЙДИТЕ сумму всех (натуральных) чисел — меньших ста тысяч", "7"),
    ("LA ME\u0301DIANE D'UN TRIANGLE coupe le co\u0302te\u0301 oppose\u0301", "8"),
]


def test_benchmark_problems_are_found_in_every_script_and_length(tmp_path: Path) -> None:
    benchmark = tiny.write_jsonl(tmp_path / "b.jsonl", [{"problem": problem} for problem in PROBLEMS])
    records = [{"id": prompt, "prompt": prompt, "response": "x"} for prompt, _ in PROMPTS]
    corpus, dropped = shard(tmp_path, records, Curation(benchmarks=(str(benchmark),)))
    found = {prompt: detail.split()[0].removeprefix("b.jsonl:") for prompt, (_, detail) in dropped.items()}
    assert found == {prompt: line for prompt, line in PROMPTS if line}
    (entry,) = corpus.manifest["settings"]["curation"]["benchmarks"]
    assert {key: entry[key] for key in ("problems", "short", "very_short", "unchecked")} == {
        "problems": 8, "short": 2, "very_short": 1, "unchecked": 1
    }  # fmt: skip
    assert corpus.manifest["unchecked"] == {
        "problems of b.jsonl without words": 1,
        "fewer than 8 words: only compared with benchmark problems as short": 4,
    }


def test_benchmark_problems_are_found_in_records_of_token_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.hf_tokenizer(tmp_path / "tokenizer"))
    benchmark = tiny.write_jsonl(tmp_path / "b.jsonl", [{"problem": SENTENCE}])
    records = []
    for name, prompt, response in (("leak", SENTENCE, "x"), ("answer", "x", SENTENCE)):
        (first, second) = tokenizer.encode_pieces([prompt, response])
        mask = [0] * len(first) + [1] * len(second)
        records.append({"id": name, "input_ids": first + second, "loss_mask": mask})
    corpus, _ = shard(tmp_path, records, Curation(benchmarks=(str(benchmark),)))
    assert ids(corpus) == ["answer"]


ANSWERS = [
    ("right", "7 + 8 = 15, so it is 15.", "15", True),
    ("boxed", r"So we get $\boxed{\frac{1}{2}}$.", "0.5", True),
    ("gsm", "He has 2 * 3 = 6 left.\n#### 6", "reasoning that says 7\n#### 6", True),
    ("wrong", "It is 16.", "15", False),
    ("silent", "I do not know.", "15", False),
]


def test_wrong_answers_are_dropped_or_scored(tmp_path: Path) -> None:
    records = [{"id": i, "prompt": f"{i}?", "response": response, "answer": gold} for i, response, gold, _ in ANSWERS]
    records.append({"id": "unreadable", "prompt": "p", "response": "1", "answer": "none at all"})
    records.append({"id": "missing", "prompt": "p", "response": "1"})
    corpus, dropped = shard(tmp_path, records, Curation(answer_field="answer"))
    assert ids(corpus) == [i for i, _, _, right in ANSWERS if right]
    assert {k: v[0] for k, v in dropped.items()} == {
        "wrong": "wrong answer",
        "silent": "wrong answer",
        "unreadable": "reference answer cannot be read",
        "missing": "no reference answer",
    }
    (tmp_path / "scored").mkdir()
    corpus, _ = shard(tmp_path / "scored", records, Curation(answer_field="answer", wrong_answers="score"))
    assert corpus.scores.tolist() == [float(right) for *_, right in ANSWERS]


def test_s1k_records_are_rendered_with_their_headings(tmp_path: Path) -> None:
    record = {
        "question": "7 + 8?",
        "deepseek_thinking_trajectory": "Seven and eight.",
        "deepseek_attempt": "15",
        "deepseek_grade": "Yes",
    }
    corpus, _ = shard(tmp_path, [record], Curation(keep="deepseek_grade == 'Yes'"), PRESETS["s1k-1.1"])
    assert corpus.tokenizer().decode(corpus.tokens(0).tolist()) == (
        "<|im_start|>user\n7 + 8?<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>think\nSeven and eight.\n<|im_start|>answer\nAnswer: 15<|im_end|>\n"
    )


@pytest.mark.command
def test_the_published_s1k_rows_are_sharded_by_the_documented_command(tmp_path: Path) -> None:
    """Rows with all columns of simplescaling/s1K-1.1; one is longer than --max-tokens and cut, as its authors cut it."""
    row = {
        "solution": "15",
        "question": "7 + 8?",
        "cot_type": "math",
        "source_type": "a source",
        "metadata": "{'level': 1}",
        "gemini_thinking_trajectory": "Not this one.",
        "gemini_attempt": "Nor this.",
        "deepseek_thinking_trajectory": "\nSeven and eight.\n",
        "deepseek_attempt": "15\n",
        "gemini_grade": "No",
        "gemini_grade_reason": "wrong",
        "deepseek_grade": "Yes",
        "deepseek_grade_reason": "right",
    }
    long = {
        **row,
        "question": "9 + 9?",
        "deepseek_thinking_trajectory": "Nine and nine. " * 40,
        "deepseek_attempt": "18",
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([row, long]), tmp_path / "data" / "train-00000-of-00001.parquet")
    tokenizer, limit = tiny.hf_tokenizer(tmp_path / "tokenizer"), 100
    cli = [
        f"{tmp_path}/data/*.parquet",
        "--output",
        tmp_path / "corpus",
        "--preset",
        "s1k-1.1",
        "--tokenizer",
        tokenizer,
    ]
    done = run_python("-m", "megatron_iwsft", "shard", *cli, "--max-tokens", str(limit), "--too-long", "truncate")
    assert done.returncode == 0, done.stdout + done.stderr
    corpus = Corpus.open(tmp_path / "corpus")
    decode, (short, cut) = corpus.tokenizer().decode, range(2)
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    response = "<|im_start|>think\nSeven and eight.\n<|im_start|>answer\nAnswer: 15<|im_end|>"
    assert decode(corpus.tokens(short).tolist()) == prompt.format("7 + 8?") + response + "\n"
    assert decode(corpus.tokens(short)[corpus.mask(short) == 1].tolist()) == response
    assert len(corpus.tokens(cut)) == limit
    trained = decode(corpus.tokens(cut)[corpus.mask(cut) == 1].tolist())
    whole = prompt.format("9 + 9?") + "<|im_start|>think\n" + "Nine and nine. " * 40
    assert decode(corpus.tokens(cut).tolist()) == prompt.format("9 + 9?") + trained and "<|im_end|>" not in trained
    assert whole.startswith(prompt.format("9 + 9?") + trained) and corpus.mask(cut)[-1] == 1


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(DataError, match=r"near-duplicates must be between 0\.3 and 1; found 0\.1"):
        Curation(near_duplicates=0.1)
    with pytest.raises(DataError, match="for 2 response fields, give no reasoning field, one, or 2; found 3"):
        RecordFormat(response_fields=("a", "b"), reasoning_fields=("x", "y", "z"))
