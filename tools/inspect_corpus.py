"""What is in a corpus directory: counts, distributions, drop reasons, packing, rendered samples: tools/inspect_corpus.py DIR"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, metavar="DIR", help="corpus directory")
    parser.add_argument("--seq-length", type=positive_int, action="append", help="packing at this length; repeatable")
    parser.add_argument("--samples", type=int, default=2, help="random trajectories to show (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as one self-contained page")
    parser.add_argument("--verify", action="store_true", help="hash every file again and compare with the manifest")
    parser.add_argument("--to-jsonl", type=Path, metavar="FILE", help="turn the shards back into records")
    args = parser.parse_args()

    from megatron_iwsft.data.corpus import Corpus
    from megatron_iwsft.data.prepare.inspect import Inspection, write_jsonl

    if args.verify:
        verify(args.corpus)
    corpus = Corpus.open(args.corpus)
    inspection = Inspection(corpus, seq_lengths=args.seq_length or [], samples=args.samples, seed=args.seed)
    print(inspection.to_terminal(colour=sys.stdout.isatty()))
    if args.html:
        args.html.write_text(inspection.to_html(), encoding="utf-8")
        print(f"wrote {args.html}")
    if args.to_jsonl:
        print(f"wrote {write_jsonl(corpus, args.to_jsonl):,} records to {args.to_jsonl}")


def verify(directory: Path) -> None:
    from megatron_iwsft.data.corpus import verify_files

    complaints = verify_files(directory)
    if complaints:
        raise DataError("\n  ".join([f"{directory} is not what its manifest says:", *complaints]))
    print(f"{directory}: every file is as the manifest says")


if __name__ == "__main__":
    run_command(main)
