"""Records (JSONL) → corpus directory: tools/shard_corpus.py INPUT… --output DIR --tokenizer PATH"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_iwsft.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL files")
    parser.add_argument("--output", required=True, type=Path, help="corpus directory to make")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face directory with tokenizer.json, or SentencePiece .model"
    )
    parser.add_argument("--template", help="named chat template (chatml, plain); default: the tokenizer's own")
    parser.add_argument("--prompt-field", default="prompt", help="dotted path of the prompt (default: prompt)")
    parser.add_argument(
        "--response-field",
        action="append",
        help="dotted path of the response; repeat for several solutions of one problem",
    )
    parser.add_argument(
        "--score-field", action="append", default=[], help="quality, a number or boolean; once, or once per response"
    )
    parser.add_argument("--min-score", type=float, help="drop trajectories that score less")
    parser.add_argument("--max-tokens", type=int, help="drop longer trajectories")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: 100 million)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args()

    from megatron_iwsft.data.records import RecordFormat
    from megatron_iwsft.data.shard import ShardSettings, shard_corpus

    settings = ShardSettings(
        tokenizer=args.tokenizer,
        template=args.template,
        record=RecordFormat(
            prompt_field=args.prompt_field,
            response_fields=tuple(args.response_field or ["response"]),
            score_fields=tuple(args.score_field),
            min_score=args.min_score,
            max_tokens=args.max_tokens,
        ),
        shard_tokens=args.shard_tokens,
    )
    manifest = shard_corpus(args.inputs, args.output, settings, workers=args.workers)
    counts = manifest["counts"]
    print(
        f"{args.output}: {counts['trajectories']:,} trajectories, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained; "
        f"{counts['dropped']:,} dropped"
    )
    for reason, n in manifest["dropped"].items():
        print(f"  {reason}: {n:,}")


if __name__ == "__main__":  # worker processes import this file
    run_command(main)
