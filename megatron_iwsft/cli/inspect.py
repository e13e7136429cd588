"""Show what a corpus, a checkpoint or a run directory holds. Its files tell which of them PATH is.

corpus: counts, length and score distributions, drop reasons, packing, how far iw-SFT's temperatures move the optimum, random samples with
the trained tokens marked
checkpoint: step, layout, model, sizes and the state of its files; for a run directory, of all its checkpoints

examples:
  iwsft inspect corpora/mine --seq-length 22528 --verify
  iwsft inspect runs/iw-sft --verify
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_iwsft.checkpoint.names import CHECKPOINTS, INFO, LATEST
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.files import write_text
from megatron_iwsft.utils.text import say

_CORPUS_FILES = ("manifest.json", "shard-*")
_CHECKPOINT_FILES = (INFO, LATEST, CHECKPOINTS, "step-*")
_CORPUS_OPTIONS = ("seq_length", "trajectories", "seed", "html", "to_jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="corpus, checkpoint or run directory")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="re-hash every file and compare with the recorded SHA-256; of a corpus, also that dropped.jsonl adds up",
    )
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--seq-length", type=positive_int, action="append", metavar="N", help="show packing; repeatable"
    )
    corpus.add_argument("--trajectories", type=int, metavar="N", help="random trajectories to print (default: 2)")
    corpus.add_argument("--seed", type=int, help="of the random choice (default: 0)")
    corpus.add_argument("--html", type=Path, metavar="FILE", help="write the same as one self-contained page")
    corpus.add_argument("--to-jsonl", type=Path, metavar="FILE", help="convert the shards back to records")
    checkpoint = parser.add_argument_group("checkpoint or run")
    checkpoint.add_argument("--show-config", action="store_true", help="print the resolved config too")


def run(args: argparse.Namespace) -> int:
    if _is_corpus(args.path):
        return _inspect_corpus(args)
    return _inspect_checkpoint(args)


def _is_corpus(path: Path) -> bool:
    """Whether `path` holds a corpus; False for checkpoints. Raises ConfigError if it holds neither."""
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {problem}. Give a corpus, checkpoint or run directory.")
    if any(next(path.glob(name), None) for name in _CHECKPOINT_FILES):
        return False
    if any(next(path.glob(name), None) for name in _CORPUS_FILES):
        return True
    raise ConfigError(
        f"{path} is neither a corpus (no {', '.join(_CORPUS_FILES)}) nor a checkpoint or run directory "
        f"(no {', '.join(_CHECKPOINT_FILES)})."
    )


def _inspect_corpus(args: argparse.Namespace) -> int:
    if args.show_config:
        raise ConfigError(f"--show-config is for checkpoints and runs; {args.path} is a corpus.")

    from megatron_iwsft.data.corpus import DROPPED, Corpus
    from megatron_iwsft.data.prepare.accounting import verify
    from megatron_iwsft.data.prepare.inspect import Inspection, write_jsonl
    from megatron_iwsft.objectives.fixed_point import exponents

    if args.verify:
        complaints = verify(args.path, show_progress=True)
        if complaints:
            raise DataError(
                f"{args.path} does not match its manifest. Restore it, or shard the records again:\n  "
                + "\n  ".join(complaints)
            )
        say(f"{args.path}: every file matches the manifest, and {DROPPED} adds up")
    corpus = Corpus.open(args.path)
    samples = 2 if args.trajectories is None else args.trajectories
    inspection = Inspection(
        corpus,
        seq_lengths=args.seq_length or [],
        samples=samples,
        seed=args.seed or 0,
        remarks=exponents(corpus.num_trained),
    )
    print(inspection.to_terminal(colour=sys.stdout.isatty()))
    if args.html:
        write_text(args.html, inspection.to_html())
        say(f"wrote {args.html}")
    if args.to_jsonl:
        say(f"wrote {write_jsonl(corpus, args.to_jsonl):,} records to {args.to_jsonl}")
    return 0


def _inspect_checkpoint(args: argparse.Namespace) -> int:
    given = [name for name in _CORPUS_OPTIONS if getattr(args, name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise ConfigError(f"--{option} is for corpora; {args.path} is a checkpoint or run directory.")

    from megatron_iwsft.checkpoint.summary import describe

    text, healthy = describe(args.path, verify=args.verify, config=args.show_config)
    say(text)
    return 0 if healthy else 1
