"""Records (JSONL, gzip or zstd JSONL, Parquet) → corpus directory: tools/shard_corpus.py INPUT… --output DIR --tokenizer PATH"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    args = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from megatron_iwsft.data.prepare.filters import Curation
    from megatron_iwsft.data.prepare.job_array import make_parts, merge_parts
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus

    if args.min_score is not None and not (args.score_field or args.source_score or args.wrong_answers == "score"):
        raise DataError("--min-score needs scores: name their field with --score-field; without one every score is 1.")
    if args.wrong_answers == "score" and (args.score_field or args.source_score):
        raise DataError("--wrong-answers score makes the score itself; leave out --score-field and --source-score.")
    settings = ShardSettings(
        tokenizer=args.tokenizer,
        template=args.template,
        record=_record_format(args),
        shard_tokens=args.shard_tokens,
        curation=Curation(
            keep=args.keep,
            min_score=args.min_score,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            near_duplicates=args.near_duplicates,
            benchmarks=tuple(args.benchmark),
            answer_field=args.answer_field,
            wrong_answers=args.wrong_answers,
            max_per_source=args.max_per_source,
        ),
    )
    if args.merge:
        manifest = merge_parts(args.inputs, args.output, settings)
    elif args.array or args.task:
        task, tasks = _array_task(args.task)
        names = make_parts(
            args.inputs, args.output, settings, task=task, tasks=tasks, workers=args.workers, encoder=args.encoder
        )
        print(f"{args.output}: parts of task {task} of {tasks} are complete: {', '.join(names) or 'no input file'}")
        return
    else:
        manifest = shard_corpus(args.inputs, args.output, settings, workers=args.workers, encoder=args.encoder)
    _print_summary(args.output, manifest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files or glob patterns: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")
    add("--output", required=True, type=Path, help="corpus directory to make")
    add("--tokenizer", required=True, help="Hugging Face directory with tokenizer.json, or SentencePiece .model")
    add("--template", help="named chat template (chatml, plain); default: the tokenizer's own")
    add("--shard-tokens", type=positive_int, default=100_000_000, help="tokens a shard (default: 100 million)")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add(
        "--encoder",
        choices=("auto", "own"),
        default="auto",
        help="own: never gigatoken (default: where its ids are equal)",
    )

    records = parser.add_argument_group(
        "records (fields are dotted paths; records with messages or input_ids need none)"
    )
    add = records.add_argument
    add("--preset", help="field names of a known corpus: s1k-1.1")
    add("--prompt-field", help="the prompt (default: prompt)")
    add("--response-field", action="append", help="the response; repeat for several solutions of one problem")
    add(
        "--reasoning-field",
        action="append",
        default=[],
        help="reasoning before the response; once, or once per response",
    )
    add("--system-field", help="the system prompt")
    add(
        "--thinking-tags",
        nargs=2,
        metavar=("OPEN", "CLOSE"),
        help=r"around reasoning that the template does not render itself; \n is a line end (default: '<think>\n' '\n</think>\n\n')",
    )
    add("--train-role", action="append", help="role whose turns are trained on: assistant (default), user; repeatable")
    add(
        "--train-turns",
        choices=("all", "last"),
        default="all",
        help="all turns of these roles, or a conversation's last",
    )
    add("--source-field", help="the source a record comes from (default: the file, or which of several responses)")

    curation = parser.add_argument_group("curation (every record that is not kept is listed in dropped.jsonl)")
    add = curation.add_argument
    add(
        "--score-field",
        action="append",
        default=[],
        help="quality: a field or an expression over fields, such as '0.5 * judge + 0.5 * correct'; once, or once per response",
    )
    add(
        "--source-score",
        action="append",
        default=[],
        metavar="SOURCE=EXPRESSION",
        help="quality of the records of one source; repeatable",
    )
    add("--min-score", type=float, help="drop trajectories that score less")
    add(
        "--keep",
        metavar="EXPRESSION",
        help="drop records for which it does not hold, such as 'judge >= 4 and not truncated'",
    )
    add("--min-tokens", type=positive_int, help="drop shorter trajectories")
    add("--max-tokens", type=positive_int, help="drop longer trajectories")
    add(
        "--near-duplicates",
        type=float,
        metavar="SIMILARITY",
        help="drop trajectories whose words resemble an earlier one's (0.3 … 1; 0.8 is usual)",
    )
    add(
        "--benchmark",
        action="append",
        default=[],
        metavar="FILE",
        help="drop prompts that share 8 words in a row with a problem of it; repeatable",
    )
    add("--answer-field", help="reference answer; responses that do not arrive at it are dropped")
    add(
        "--wrong-answers",
        choices=("drop", "score"),
        default="drop",
        help="score: keep them; the score is 1 for right, 0 for wrong",
    )
    add("--max-per-source", type=positive_int, help="keep this many trajectories of each source")

    array = parser.add_argument_group("job arrays (slurm/shard_corpus.sbatch)")
    add = array.add_mutually_exclusive_group().add_argument
    add("--array", action="store_true", help="do this Slurm array task's share of the input files")
    add("--task", metavar="I/N", help="do share I (from 0) of N of the input files")
    add("--merge", action="store_true", help="make the corpus of all shares, with the same arguments")
    return parser


def _record_format(args: argparse.Namespace) -> Any:
    from megatron_iwsft.data.prepare.records import PRESETS, RecordFormat

    if args.preset is not None and args.preset not in PRESETS:
        raise DataError(f"there is no preset {args.preset!r}; there are: {', '.join(PRESETS)}.")
    base = PRESETS[args.preset] if args.preset else RecordFormat()
    bad = next((s for s in args.source_score if "=" not in s), None)
    if bad:
        raise DataError(f"--source-score {bad!r} is not of the form SOURCE=EXPRESSION.")
    rendering = replace(
        base.rendering,
        roles=tuple(args.train_role or base.rendering.roles),
        turns=args.train_turns,
        thinking=tuple(t.replace(r"\n", "\n") for t in args.thinking_tags)
        if args.thinking_tags
        else base.rendering.thinking,
    )
    return replace(
        base,
        prompt_field=args.prompt_field or base.prompt_field,
        response_fields=tuple(args.response_field or base.response_fields),
        reasoning_fields=tuple(args.reasoning_field) or base.reasoning_fields,
        system_field=args.system_field,
        score_fields=tuple(args.score_field),
        source_field=args.source_field,
        source_scores=tuple(
            (name, expression) for name, _, expression in (s.partition("=") for s in args.source_score)
        ),
        rendering=rendering,
    )


def _array_task(given: str | None) -> tuple[int, int]:
    """(task from 0, number of tasks), as given or from Slurm's environment."""
    if given is not None:
        task, _, tasks = given.partition("/")
        if not (task.isdigit() and tasks.isdigit()):
            raise DataError(f"--task {given!r} is not of the form I/N, as in 0/8.")
        return int(task), int(tasks)
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise DataError(
            f"--array needs {', '.join(missing)} in the environment. Run it by sbatch --array=0-7, or use --task I/N."
        )
    number, first, count = (int(os.environ[name]) for name in names)
    return number - first, count


def _print_summary(output: Path, manifest: dict[str, Any]) -> None:
    counts = manifest["counts"]
    print(
        f"{output}: {counts['trajectories']:,} trajectories, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained; "
        f"{counts['dropped']:,} dropped"
    )
    for reason, n in manifest["dropped"].items():
        print(f"  {reason}: {n:,}")


if __name__ == "__main__":  # worker processes import this file
    run_command(main)
