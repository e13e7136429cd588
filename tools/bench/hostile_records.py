"""Shard malformed and borderline records, and check that each is kept or dropped exactly once.

    python tools/bench/hostile_records.py [--records 1000000] [--seed S] [--workers N]

Writes JSONL files (plain, with CRLF, gzip, zstd, without a final line break) of valid records, records with values of odd types and
texts, lines that are cut, damaged, binary, blank or too long, and records just below and above every limit. The generator knows which
lines must be kept and which must be dropped. Then it shards them, and compares the corpus, dropped.jsonl and the manifest with what it
wrote. Prints the counts; exits with status 1 if a line is missing, counted twice, or on the wrong side.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa

from megatron_iwsft.data.corpus import DROPPED, Corpus
from megatron_iwsft.data.prepare.accounting import verify
from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer
from megatron_iwsft.utils.cli import positive_int, run_command

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 50_000  # bytes of a record
MOST_TOKENS = 400
KEPT, DROPPED_, EITHER, BLANK = "kept", "dropped", "either", "blank"
Line = tuple[bytes, str]  # without its line break; what must happen to it

# Values of odd types, and texts that are hard to encode or look like control tokens.
ODD = [
    *(None, 3, -1.5, [], {}, "", "  ", True, [[1]], {"role": 1}, "\ud83d", "x" * 20_000, 10**400, float("nan"), [None]),
    *(float("-inf"), 2**63, -(2**63) - 1, "0", "true", {"a": {"b": []}}, ["text", 3], "\n", "\u2028\u2029\x85\x0b\x0c"),
    *("<|im_end|>", "a<|im_start|>assistant\nb", "<|endof", "text|>", "\x00\x01", "\u202e\ufeff", "e\u0301\u0301" * 40),
    *(
        ["<|im_end|>"],
        [{"type": "text", "text": "p"}],
        [{"type": "image_url"}],
        "\U0010ffff\ufffe",
        "%s {{ x }} {% raw %}",
    ),
]
# Lines that are no record, whatever they look like.
NO_RECORDS = [
    *(
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 9,
        b"[" * 5000,
        b'{"a":' * 2000,
        b"{",
        b"}",
        b"{}}",
        b"{'a': 1}",
    ),
    *(
        b"\xef\xbb\xbf",
        b"NaN",
        b'{"a": 1,}',
        b'{"a" 1}',
        b'{"prompt": "\xc3", "response": "x"}',
        b'{"prompt": "a\x01"}',
        b"// {}",
    ),
    *(
        b"{}",
        b'{"messages": null}',
        b'{"messages": []}',
        b'{"messages": [3]}',
        b'{"input_ids": []}',
        b'{"prompt": "a"}',
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=positive_int, default=1_000_000, help="lines to write (default: 1 million)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-") as directory:
        return check(Path(directory), args.records, args.seed, args.workers)


def check(home: Path, records: int, seed: int, workers: int) -> int:
    """Write, shard and compare; returns the exit status."""
    rng = random.Random(seed)
    write_tokenizer(home)
    expected = write_inputs(home, records, rng)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "shard_corpus.py"), *(str(home / name) for name in expected),
         "--output", str(home / "corpus"), "--tokenizer", str(home / "tokenizer"), "--score-field", 'field("score", 1)',
         "--max-record-bytes", str(LONGEST), "--max-tokens", str(MOST_TOKENS), "--workers", str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        return done.returncode
    print(done.stdout + f"sharded in {time.perf_counter() - begin:.0f} s with {workers} workers", flush=True)
    problems = verify(home / "corpus") + compare(home / "corpus", expected)
    for problem in problems[:20]:
        print(f"  {problem}")
    written = sum(len(lines) - lines.count(BLANK) for lines in expected.values())
    print(f"{records:,} lines, {written:,} of them not blank: {len(problems)} problems")
    return 1 if problems else 0


def compare(directory: Path, expected: dict[str, list[str]]) -> list[str]:
    """What is wrong with a corpus: lines that are missing, trajectories that are there twice, lines on the wrong side."""
    found: Counter[tuple[str, int, str]] = Counter()
    sides: dict[tuple[str, int], set[str]] = {}
    corpus = Corpus.open(directory)
    meta = corpus.meta(["file", "line", "id"])
    for name, line, id_ in zip(*(meta[column].to_pylist() for column in ("file", "line", "id")), strict=True):
        found[name, line, id_] += 1
        sides.setdefault((name, line), set()).add(KEPT)
    reasons: Counter[str] = Counter()
    with open(directory / DROPPED, "rb") as file:
        for entry in map(orjson.loads, file):
            found[entry["file"], entry["line"], entry["id"]] += 1
            sides.setdefault((entry["file"], entry["line"]), set()).add(DROPPED_)
            reasons[entry["reason"]] += 1
    counts, counted = corpus.manifest["counts"], corpus.manifest["dropped"]
    problems = [f"{name}, line {line} ({id_}) is there {n} times" for (name, line, id_), n in found.items() if n != 1]
    if reasons != counted or found.total() != counts["trajectories"] + counts["dropped"]:
        problems.append("the manifest's counts are not those of the corpus and dropped.jsonl")
    for name, lines in expected.items():
        for number, wanted in enumerate(lines, 1):
            there = sides.pop((name, number), set())
            if there != {wanted} and not (wanted == EITHER and there) and not (wanted == BLANK and not there):
                problems.append(f"{name}, line {number} should be {wanted}, and is {' and '.join(there) or 'missing'}")
    problems += [f"{name}, line {line} was never written" for name, line in sides]
    return problems + [f"trajectory {i} has control tokens that are not its template's" for i in _forged(corpus)]


def _forged(corpus: Corpus) -> Iterator[int]:
    """Trajectories whose control tokens are not a begin and an end for each turn. Records of token ids have none."""
    tokenizer = corpus.tokenizer()
    (begin,), (end,) = tokenizer.encode_pieces(["<|im_start|>", "<|im_end|>"])
    for i in range(len(corpus)):
        ids = corpus.tokens(i)
        control = ids[np.isin(ids, tokenizer.control_ids)].tolist()
        if control != [begin, end] * (len(control) // 2):
            yield i


def write_tokenizer(home: Path) -> None:
    sample = home / "sample.jsonl"
    sample.write_text("\n".join(json.dumps({"text": f"What is {i}? It is {i * i}."}) for i in range(300)))
    train_tokenizer([sample], home / "tokenizer", fields=["text"], vocab_size=400)


def write_inputs(home: Path, records: int, rng: random.Random) -> dict[str, list[str]]:
    """Write `records` lines to five files; returns what must happen to each line of each file."""
    expected: dict[str, list[str]] = {}
    names = ("plain.jsonl", "crlf.jsonl", "packed.jsonl.gz", "packed.jsonl.zst", "open-end.jsonl")
    bounds = [records * k // len(names) for k in range(len(names) + 1)]
    for name, first, end in zip(names, bounds, bounds[1:], strict=False):
        outcomes = expected[name] = []
        line_break = b"\r\n" if name == "crlf.jsonl" else b"\n"
        with _open(home / name) as file:
            for i in range(first, end):
                line, outcome = hostile_line(rng, i)
                if name == "open-end.jsonl" and i == end - 1:
                    line, outcome, line_break = pair(i), KEPT, b""
                outcomes.append(outcome)
                file.write(line + line_break)
    return expected


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=1)  # type: ignore[return-value]
    return pa.CompressedOutputStream(str(path), "zstd") if path.suffix == ".zst" else open(path, "wb")  # type: ignore[return-value]


def hostile_line(rng: random.Random, i: int) -> Line:
    """Line i: one of the kinds below, by chance."""
    return rng.choices(_KINDS, _WEIGHTS)[0](rng, i)


def pair(i: int, **more: Any) -> bytes:
    return json.dumps({"id": i, "prompt": f"What is {i}?", "response": f"It is {i}.", **more}).encode()


def chat(i: int, turns: int = 1) -> dict[str, Any]:
    roles = [("user", f"Question {i}, part {k}?", "assistant", f"Answer {i}.{k}") for k in range(turns)]
    return {"messages": [{"role": r, "content": c} for a, b, c_, d in roles for r, c in ((a, b), (c_, d))]}


def tokens(i: int, length: int = 9) -> dict[str, Any]:
    """Distinct for every i."""
    digits = [int(d) for d in f"{i:07d}"]
    ids = [3 + d for d in digits] + [7] * (length - len(digits))
    return {"input_ids": ids, "loss_mask": [0] * (length - 1) + [1]}


def valid(rng: random.Random, i: int) -> Line:
    fields: dict[str, Any] = {"score": rng.random(), "meta": {"unused": [None, rng.choice(ODD[:9])]}}
    record = rng.choice([lambda: json.dumps(chat(i, rng.randint(1, 4)) | fields).encode(), lambda: pair(i, **fields)])()
    return rng.choice([record, b"  " + record + b" \t", json.dumps(tokens(i)).encode()]), KEPT


def limits(rng: random.Random, i: int) -> Line:
    """Just below or above a limit: bytes of a record, tokens of a trajectory, ids of the vocabulary."""
    above = rng.random() < 0.5
    kind = rng.randrange(3)
    if kind == 0:
        size = LONGEST + 1 if above else LONGEST - 1  # one file has a carriage return before each line break
        return pair(i, padding="x" * (size - len(pair(i, padding="")))), DROPPED_ if above else KEPT
    if kind == 1:
        return json.dumps(tokens(i, MOST_TOKENS + above)).encode(), DROPPED_ if above else KEPT
    record = tokens(i)
    record["input_ids"][-2] = rng.choice([400, 2**31, 2**64, -1]) if above else 5 + i % 9
    return json.dumps(record).encode(), DROPPED_ if above else KEPT


def cut(rng: random.Random, i: int) -> Line:
    """Without its end: no prefix of an object is JSON."""
    line = pair(i)
    return line[: rng.randrange(1, len(line))], DROPPED_


def flipped(rng: random.Random, i: int) -> Line:
    """One byte changed; it may still be a record."""
    raw = bytearray(pair(i))
    raw[rng.randrange(len(raw))] = rng.choice([b for b in range(256) if b not in b"\n\r"])
    return bytes(raw), EITHER


def odd_value(rng: random.Random, i: int) -> Line:
    record = rng.choice([lambda: json.loads(pair(i, score=1)), lambda: chat(i, 2), lambda: tokens(i)])()
    holder = rng.choice(record["messages"]) if "messages" in record and rng.random() < 0.7 else record
    keys = ["role", "content", "reasoning", "tool_calls", "name"] if holder is not record else sorted(record)
    holder[rng.choice(keys)] = rng.choice(ODD)
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"), EITHER


def missing(rng: random.Random, i: int) -> Line:
    record = rng.choice([lambda: json.loads(pair(i)), lambda: tokens(i)])()
    del record[rng.choice(sorted(record.keys() - {"id", "input_ids"}))]
    return json.dumps(record).encode(), DROPPED_


def wrong_text(rng: random.Random, i: int) -> Line:
    """A prompt or response that is empty, blank, no text, or holds a control token."""
    record = json.loads(pair(i))
    record[rng.choice(["prompt", "response"])] = rng.choice(
        ["", " \n ", None, 3, {"x": 1}, f"<|im_end|>{i}", "a<|im_start|>b"]
    )
    return json.dumps(record).encode(), DROPPED_


def duplicate(rng: random.Random, i: int) -> Line:
    """One of a few records, repeated: the first of each is kept."""
    return pair(-1 - rng.randrange(50)), EITHER


def too_long(rng: random.Random, i: int) -> Line:
    size = LONGEST + rng.choice([1, 2, 10, 1000, 200_000]) if rng.random() < 0.99 else 3_000_000
    return rng.choice([b"x", b" ", b"[", b"\x00", b'{"prompt": "'])[:1] * size, DROPPED_


def no_record(rng: random.Random, i: int) -> Line:
    return rng.choice(NO_RECORDS), DROPPED_


def blank(rng: random.Random, i: int) -> Line:
    return rng.choice([b"", b" ", b"\t\t", b"   \x0b\x0c "]), BLANK


_TABLE: dict[Callable[[random.Random, int], Line], int] = {
    valid: 300, limits: 30, cut: 100, flipped: 100, odd_value: 200, missing: 60, wrong_text: 60, duplicate: 60, too_long: 2, no_record: 60,
    blank: 28,
}  # fmt: skip
_KINDS, _WEIGHTS = list(_TABLE), list(_TABLE.values())


if __name__ == "__main__":
    run_command(main)
