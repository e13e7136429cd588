"""Generate an arithmetic-reasoning corpus with quality scores: tools/make_arithmetic.py --output FILE.jsonl --count N"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=positive_int, default=10_000)
    parser.add_argument("--digits", type=positive_int, default=2, help="digits of each summand")
    parser.add_argument("--wrong", type=float, default=0.3, help="share of wrong demonstrations")
    parser.add_argument("--judge-error", type=float, default=0.1, help="share that the score judges the other way")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records

    settings = ArithmeticSettings(args.digits, args.wrong, args.judge_error)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:
        for record in arithmetic_records(args.count, settings, args.seed):
            file.write(json.dumps(record) + "\n")
    print(f"wrote {args.count:,} records to {args.output}")


if __name__ == "__main__":
    run_command(main)
