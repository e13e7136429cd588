"""Train a BPE tokenizer on text fields of JSONL records, for models that start from random weights.

example:
  iwsft train-tokenizer train.jsonl --output tokenizer --text-field question --text-field answer --vocab-size 4000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL file")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="tokenizer directory to create")
    parser.add_argument(
        "--text-field", metavar="FIELD", action="append", required=True, help="text field to train on; repeatable"
    )
    parser.add_argument("--vocab-size", type=positive_int, default=8000, metavar="N", help="tokens in the vocabulary")


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    train_tokenizer(args.inputs, args.output, fields=args.text_field, vocab_size=args.vocab_size)
    say(f"wrote {args.output}")
