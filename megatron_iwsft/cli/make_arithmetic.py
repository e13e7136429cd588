"""Generate arithmetic records (JSONL), some of them wrong: worked sums with scores of an unreliable judge, or doublings.

Doublings (--task doubling) are short: "What is 2 × 17384?" A wrong one forgets to carry. The quick start trains on them.

example:
  iwsft make-arithmetic --output sums.jsonl --count 12000 --wrong 0.3
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.files import atomic_write
from megatron_iwsft.utils.jsonl import read_json_lines
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    add("--task", choices=("sums", "doubling"), default="sums", help="what to generate (default: sums)")
    add("--count", type=positive_int, default=10_000, metavar="N", help="records (default: 10,000)")
    add("--wrong", type=float, default=0.3, metavar="SHARE", help="share of wrong answers, 0 to 1 (default: 0.3)")
    add("--seed", type=int, default=0, help="of the random generator (default: 0)")
    add("--digits", type=positive_int, default=2, metavar="N", help="of sums: digits per summand (default: 2)")
    judge_help = "of sums: share of wrong scores, 0 to 1 (default: 0.1)"
    add("--judge-error", type=float, default=0.1, metavar="SHARE", help=judge_help)
    add(
        "--leave-out",
        type=Path,
        metavar="FILE.jsonl",
        help="leave out the problems of this file, such as held-out ones",
    )


def run(args: argparse.Namespace) -> None:
    left_out = frozenset(_prompts(args.leave_out)) if args.leave_out else frozenset()
    records = itertools.islice((r for r in _records(args) if r["prompt"] not in left_out), args.count)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    say(f"wrote {args.count:,} records to {args.output}")


def _records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """More of them than are wanted."""
    from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records, doublings

    if args.task == "sums":
        return arithmetic_records(sys.maxsize, ArithmeticSettings(args.digits, args.wrong, args.judge_error), args.seed)
    return doublings(sys.maxsize, forgets_to_carry=args.wrong, seed=args.seed)


def _prompts(path: Path) -> Iterator[str]:
    rows, damage = read_json_lines(path, valid=lambda i, row: isinstance(row.get("prompt"), str))
    if damage:
        raise DataError(f"{path} is damaged: {damage}. Give a file that `iwsft make-arithmetic` has written.")
    return (row["prompt"] for row in rows)
