"""Generated doublings: right or wrong by one rule, never both, and not those that are left out."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from megatron_iwsft.cli.main import main
from megatron_iwsft.data.prepare.arithmetic import doublings


def test_a_wrong_doubling_forgets_to_carry() -> None:
    records = list(doublings(2000, forgets_to_carry=0.667, seed=3))
    assert records == list(itertools.islice(doublings(10**9, forgets_to_carry=0.667, seed=3), 2000))
    wrong = 0
    for record in records:
        number = int(re.fullmatch(r"What is 2 × (\d{5})\?", record["prompt"])[1])
        assert int(record["answer"]) == 2 * number and len(record["answer"]) == 5
        without_carrying = [2 * int(digit) % 10 for digit in str(number)]
        assert record["answer"] != "".join(map(str, without_carrying))
        assert record["correct"] == (record["response"] == record["answer"])
        if not record["correct"]:
            assert [int(digit) for digit in record["response"]] == without_carrying
            wrong += 1
    assert wrong / len(records) == pytest.approx(0.667, abs=0.04)


def test_problems_of_a_file_are_left_out(tmp_path: Path) -> None:
    held_out, practice = tmp_path / "held-out.jsonl", tmp_path / "practice.jsonl"
    options = ["--count", "300", "--digits", "1"]
    for more in (["--output", held_out, "--seed", "1"], ["--output", practice, "--leave-out", held_out]):
        with pytest.raises(SystemExit, match="0"):
            main(["make-arithmetic", *options, *map(str, more)])
    first, second = ({json.loads(line)["prompt"] for line in p.read_text().splitlines()} for p in (held_out, practice))
    assert len(practice.read_text().splitlines()) == 300 and second and not first & second
