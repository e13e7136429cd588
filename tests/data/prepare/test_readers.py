"""Input files: JSONL, gzip, zstd and Parquet give the same corpus; glob patterns; damaged files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare import readers
from megatron_iwsft.data.prepare.readers import Block, Input, find_inputs, numbered_records, read_blocks
from megatron_iwsft.data.prepare.records import Dropped, RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import DataError
from tests.support import tiny

RECORDS = [
    {"id": f"r{i}", "prompt": f"What is {i} + {i}? 雪", "response": f"{2 * i}\n", "score": i / 7} for i in range(3000)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.hf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, records: list) -> Path:
    """Write records in the format of the file name; compressed files have two members, as after appending."""
    text = [json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records]
    halves = [b"".join(text[: len(text) // 2]), b"".join(text[len(text) // 2 :])]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=700)
    elif path.suffix == ".gz":
        path.write_bytes(b"".join(gzip.compress(half) for half in halves))
    elif path.suffix == ".zst":
        codec = pa.Codec("zstd")
        path.write_bytes(b"".join(codec.compress(half, asbytes=True) for half in halves))
    else:
        path.write_bytes(b"".join(halves))
    return path


NAMES = ("r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.parquet")


@pytest.mark.parallel
def test_every_format_gives_the_same_corpus(tmp_path: Path, tokenizer: Path) -> None:
    shards = []
    for k, name in enumerate(NAMES):
        source = write(tmp_path / name, RECORDS)
        output = tmp_path / f"corpus{k}"
        settings = ShardSettings(str(tokenizer), record=RecordFormat(score_fields=("score",)))
        shard_corpus([source], output, settings, workers=1 + k % 2, show_progress=False)
        corpus = Corpus.open(output)
        assert len(corpus) == len(RECORDS)
        assert corpus.meta(["id"])["id"].to_pylist() == [r["id"] for r in RECORDS]
        assert corpus.meta(["line"])["line"].to_pylist() == list(range(1, len(RECORDS) + 1))
        shards.append([(output / f"shard-00000{s}").read_bytes() for s in (".bin", ".idx", ".mask.bin")])
    assert all(shard == shards[0] for shard in shards)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [0, 1, 699, 700, 2999, 3000])
def test_reading_can_start_at_any_line(tmp_path: Path, name: str, skip: int, monkeypatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
    source = Input(write(tmp_path / name, RECORDS), name)
    blocks = list(read_blocks(source, skip))
    assert sum(b.count for b in blocks) == len(RECORDS) - skip
    at = skip
    for block in blocks:
        assert block.first == at
        assert [r["id"] for r in records_of(block)] == [f"r{i}" for i in range(at, at + block.count)]
        at += block.count


def records_of(block: Block) -> list[dict]:
    content = block.content()
    return [json.loads(line) for line in content.splitlines()] if isinstance(content, bytes) else content.to_pylist()


def test_a_file_without_a_final_newline_is_read_completely(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    (block,) = read_blocks(Input(path, "r.jsonl"))
    assert (block.count, block.content()) == (3, b'{"a": 1}\n\n{"a": 2}')


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_too_long_is_not_held_in_memory(tmp_path: Path, monkeypatch, suffix: str) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    lines = [
        b'{"a": 1}',
        b"x" * 50_000,
        b'{"a": 2}',
        b" " * 1001,
        b"[" + b" " * 998 + b"]",
        b'{"b": "' + b"y" * 991 + b'"}',
    ]
    path = tmp_path / f"r{suffix}"
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    blocks = list(read_blocks(Input(path, "r.jsonl"), longest=1000))
    assert sum(block.count for block in blocks) == len(lines)
    assert max(len(bytes(b.content())) for b in blocks) <= 1101
    found = [pair for block in blocks for pair in numbered_records(block, longest=1000)]
    assert [line for line, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [r for _, r in found if not isinstance(r, Dropped)] == [{"a": 1}, {"a": 2}, {"b": "y" * 991}]
    assert [(r.reason, r.detail) for _, r in found if isinstance(r, Dropped)] == [
        ("record too large", "50,000 bytes; the maximum is 1,000"),
        ("record too large", "1,001 bytes; the maximum is 1,000"),
        ("not a JSON object", "found list"),
    ]


def test_rows_of_parquet_that_are_too_large_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"a": ["x", "y" * 5000, "z"]}), path)
    (block,) = read_blocks(Input(path, "r.parquet"))
    kinds = [r.reason if isinstance(r, Dropped) else r for _, r in numbered_records(block, longest=1000)]
    assert kinds == [{"a": "x"}, "record too large", {"a": "z"}]


def test_glob_patterns_are_expanded_and_files_named(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([tmp_path / "b/*.jsonl", tmp_path / "a/1.jsonl", tmp_path / "b/2.jsonl"])
    assert [i.name for i in found] == ["b/10.jsonl", "b/2.jsonl", "a/1.jsonl"]
    with pytest.raises(DataError, match=r"input file .*/c/\*\.jsonl does not exist"):
        find_inputs([tmp_path / "c/*.jsonl"])
    with pytest.raises(DataError, match="is a directory"):
        find_inputs([tmp_path])


@pytest.mark.parametrize("name", NAMES[1:])
def test_damaged_files_are_reported_by_name(tmp_path: Path, tokenizer: Path, name: str) -> None:
    source = write(tmp_path / name, RECORDS)
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"input file .*{name} (is damaged|cannot be read)"):
        shard_corpus([source], tmp_path / "corpus", ShardSettings(str(tokenizer)), show_progress=False)


def rows(path: Path, table: pa.Table, longest: int = readers.LONGEST_RECORD) -> list:
    """The records of a table, written to a Parquet file and read again."""
    pq.write_table(table, path)
    (source,) = find_inputs([path])
    (block,) = read_blocks(source)
    return [record for _, record in numbered_records(block, longest=longest)]


FAR = pa.array([2**62, 5, None], pa.timestamp("us", tz="Mars/Olympus"))
NANOSECONDS = pa.array([1, 2, None], pa.timestamp("ns"))
TIMES = {
    "a column": FAR,
    "nanoseconds": NANOSECONDS,
    "a struct": pa.StructArray.from_arrays([FAR, NANOSECONDS], ["created", "seen"]),
    "a list": pa.ListArray.from_arrays([0, 1, 1, 3], NANOSECONDS),
    "a dictionary": NANOSECONDS.dictionary_encode(),
    "a map": pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["x", "y", "z"]), FAR),
    "a date": pa.array([2**31 - 1, 1, None], pa.int32()).cast(pa.date32()),
    "a duration": pa.array([2**62, 1, None], pa.duration("s")),
    "a struct in a list": pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([NANOSECONDS], ["at"])),
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("longest", [10_000, 2000], ids=["together", "one by one"])
def test_times_at_any_depth_harm_no_record(tmp_path: Path, times: pa.Array, longest: int) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "response": ["d" * 1000] * 3, "meta": times})
    assert [record["prompt"] for record in rows(tmp_path / "times.parquet", table, longest)] == ["a", "b", "c"]


def test_the_time_of_a_message_harms_no_record_and_reads_as_text(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("timestamp", pa.timestamp("ns", "UTC"))])
    turns = [{"role": "user", "content": "a", "timestamp": 1}, {"role": "assistant", "content": "b", "timestamp": None}]
    found = rows(tmp_path / "times.parquet", pa.table({"messages": pa.array([turns], pa.list_(message))}))
    user, assistant = found[0]["messages"]
    assert user == {"role": "user", "content": "a", "timestamp": "1970-01-01 00:00:00.000000001"}
    assert assistant == {"role": "assistant", "content": "b"}


def test_maps_are_objects_and_decimals_numbers(tmp_path: Path) -> None:
    arguments = pa.array([[("city", "Rome")], [], None, [("a", "b"), ("a", "c")]], pa.map_(pa.string(), pa.string()))
    calls = pa.ListArray.from_arrays([0, 1, 2, 3, 4], pa.StructArray.from_arrays([arguments], ["arguments"]))
    scores = pa.array([1, 2, None, 4], pa.decimal128(5, 2))
    found = rows(tmp_path / "maps.parquet", pa.table({"calls": calls, "score": scores}))
    assert found[:3] == [
        {"calls": [{"arguments": {"city": "Rome"}}], "score": 1.0},
        {"calls": [{"arguments": {}}], "score": 2.0},
        {"calls": [{}]},
    ]
    assert isinstance(found[3], Dropped) and found[3].detail == "calls: a map has a key twice"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n  {"prompt": "a", "response": "b"}\n]', r"one JSON array.*jq -c '\.\[\]'"),
        (b'[{"prompt": "a", "response": "b"}]', "one JSON array"),
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        (b"\xff\xff\xff\xff\x10\x00", "an Arrow file"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl.gz"])
def test_files_that_are_no_records_are_refused_with_what_to_do(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    path = tmp_path / f"r.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=message):
        list(read_blocks(Input(path, path.name)))


def test_files_differ_in_their_sources_unless_only_the_format_differs() -> None:
    names = ["v1.0/a.jsonl", "v1.1/a.jsonl.gz", "part.0001.parquet", "a.json", ".gz"]
    stems = [Input(Path(name), name).stem for name in names]
    assert stems == ["v1.0/a", "v1.1/a", "part.0001", "a", ".gz"]


def test_null_members_of_structs_are_left_out_at_any_depth(tmp_path: Path) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}]
    records = [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": {"role": "assistant", "content": None, "tool_calls": call},
            "chat_template_kwargs": {"enable_thinking": False, "style": {"tone": "dry"}},
            "tools": [{"function": {"name": "f", "parameters": {"city": {"type": "string"}}}}],
            "meta": {"chosen": [{"parts": [{"tool_calls": call, "content": "x"}]}]},
        },
        {
            "prompt": [{"role": "user", "content": "b", "name": "Ann"}],
            "chosen": {"role": "assistant", "content": "c"},
            "chat_template_kwargs": {"date_string": "1 May", "style": {"words": 3}},
            "tools": [{"function": {"name": "g", "parameters": {"days": {"type": "number", "enum": [1, None]}}}}],
            "meta": {"chosen": [{"parts": [{"content": "y", "score": 1.0}]}]},
        },
    ]
    assert rows(tmp_path / "nulls.parquet", pa.Table.from_pylist(records)) == records
