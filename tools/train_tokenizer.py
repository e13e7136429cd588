"""Train a tokenizer on JSONL records: tools/train_tokenizer.py INPUT… --output DIR --field question --field answer"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL files")
    parser.add_argument("--output", required=True, type=Path, help="tokenizer directory to make")
    parser.add_argument("--field", action="append", required=True, help="text field to train on; repeat for several")
    parser.add_argument("--vocab-size", type=positive_int, default=8000)
    args = parser.parse_args()

    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    train_tokenizer(args.inputs, args.output, fields=args.field, vocab_size=args.vocab_size)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
