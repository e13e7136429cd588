"""Generate an arithmetic corpus (JSONL) of worked sums, some of them wrong, with scores of an unreliable judge.

example:
  iwsft make-arithmetic --output sums.jsonl --count 12000 --wrong 0.3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.files import atomic_write
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--count", type=positive_int, default=10_000, metavar="N", help="records")
    parser.add_argument("--digits", type=positive_int, default=2, metavar="N", help="digits per summand")
    parser.add_argument("--wrong", type=float, default=0.3, metavar="SHARE", help="share of wrong answers, 0 to 1")
    parser.add_argument("--judge-error", type=float, default=0.1, metavar="SHARE", help="share of wrong scores, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the random generator")


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records

    settings = ArithmeticSettings(args.digits, args.wrong, args.judge_error)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        for record in arithmetic_records(args.count, settings, args.seed):
            file.write(json.dumps(record) + "\n")
    say(f"wrote {args.count:,} records to {args.output}")
