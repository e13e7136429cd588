"""Convert records (JSONL, gzip or zstd JSONL, Parquet) to a corpus directory: render, mask, filter, deduplicate, tokenize.

An interrupted command continues when repeated. The result does not depend on the number of workers.

example:
  iwsft shard 'data/*.jsonl.zst' --output corpora/mine --tokenizer /models/Qwen2.5-7B --score-field score --min-score 0.5
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.cli import add_template_options, imports, positive_int, template_options
from megatron_iwsft.utils.text import say
from megatron_iwsft.utils.worker_processes import start_forkserver

_PRELOADED = [
    "megatron_iwsft.data.prepare.shard",
    "tokenizers",
    "gigatoken",
    "awkward",
]  # gigatoken imports awkward when it encodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file or glob pattern: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")
    add("--output", required=True, type=Path, metavar="DIR", help="corpus directory to create")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="Hugging Face directory with tokenizer.json, or SentencePiece .model",
    )
    add("--template", metavar="NAME", help="named chat template (chatml, plain, deepseek-r1); default: the tokenizer's")
    add_template_options(add)
    add(
        "--shard-tokens",
        type=positive_int,
        default=100_000_000,
        metavar="N",
        help="tokens per shard (default: 100 million)",
    )
    add(
        "--workers",
        type=positive_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )
    restart_help = "discard what an unfinished run left in the output directory, instead of continuing it"
    add("--restart", action="store_true", help=restart_help)
    encoder_help = "auto: gigatoken where its token ids equal the tokenizer's; own: never gigatoken"
    add("--encoder", choices=("auto", "own"), default="auto", help=encoder_help)
    _add_record_options(parser)
    _add_curation_options(parser)
    group = parser.add_argument_group("job arrays (slurm/shard_corpus.sbatch)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--array", action="store_true", help="process this Slurm array task's share of the input files")
    add("--share", metavar="I/N", help="process share I (from 0) of N of the input files")
    add("--merge", action="store_true", help="merge the shares into the corpus; other arguments as for the shares")


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    title = "records (fields are dotted paths; records with messages, conversations or input_ids need none)"
    add = parser.add_argument_group(title).add_argument
    add("--preset", metavar="NAME", help="how to read a known dataset: s1k-1.1, openthoughts, openr1, preference")
    layout_help = "fields: read prompt and response fields also from records that have messages (default: auto)"
    add("--layout", choices=("auto", "fields"), help=layout_help)
    add("--ignore-key", action="append", default=[], metavar="KEY", help="key of messages to leave out; repeatable")
    plain_help = "added token of the tokenizer that content may contain, such as <b>; repeatable"
    add("--plain-token", action="append", default=[], metavar="TOKEN", help=plain_help)
    add("--prompt-field", metavar="FIELD", help="prompt (default: prompt)")
    add(
        "--response-field",
        action="append",
        metavar="FIELD",
        help="response, or a list of them; repeat for several solutions",
    )
    reasoning_help = "reasoning before the response; once, or once per response"
    add("--reasoning-field", action="append", default=[], metavar="FIELD", help=reasoning_help)
    add("--system-field", metavar="FIELD", help="system prompt")
    thinking_help = r"text around reasoning that the template does not render; \n is a newline (default: '<think>\n' '\n</think>\n\n')"
    add("--thinking-tags", nargs=2, metavar=("OPEN", "CLOSE"), help=thinking_help)
    add(
        "--train-role",
        action="append",
        metavar="ROLE",
        help="train on this role's turns (default: assistant); repeatable",
    )
    add(
        "--train-turns",
        choices=("all", "last"),
        default="all",
        help="train on all turns of these roles, or on the last",
    )
    source_help = "source of the record (default: the file, or which of several responses)"
    add("--source-field", metavar="FIELD", help=source_help)


def _add_curation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("curation (dropped.jsonl lists every dropped record with the reason)").add_argument
    score_help = (
        "quality score: a field, or an expression such as '0.5 * judge + 0.5 * correct'; once, or once per response"
    )
    add("--score-field", action="append", default=[], metavar="EXPRESSION", help=score_help)
    source_help = "quality score for the records of one source; repeatable"
    add("--source-score", action="append", default=[], metavar="SOURCE=EXPRESSION", help=source_help)
    add("--min-score", type=float, metavar="X", help="drop trajectories with a lower score")
    add(
        "--keep",
        metavar="EXPRESSION",
        help="keep only records for which it holds, such as 'judge >= 4 and not truncated'",
    )
    add("--min-tokens", type=positive_int, metavar="N", help="drop shorter trajectories")
    add("--max-tokens", type=positive_int, metavar="N", help="drop longer trajectories")
    long_help = "truncate: cut longer trajectories after --max-tokens tokens instead of dropping them"
    add("--too-long", choices=("drop", "truncate"), default="drop", help=long_help)
    near_help = "drop near-duplicates of earlier trajectories, by word overlap (0.3 to 1; 0.8 is usual)"
    add("--near-duplicates", type=float, metavar="SIMILARITY", help=near_help)
    benchmark_help = "decontaminate: drop prompts that share 8 words in a row with one of its problems; repeatable"
    add("--benchmark", action="append", default=[], metavar="FILE", help=benchmark_help)
    texts_help = (
        "texts that are compared with the problems: prompts, or all, also responses and reasoning (default: prompts)"
    )
    add("--benchmark-texts", choices=("prompts", "all"), default="prompts", help=texts_help)
    add("--answer-field", metavar="FIELD", help="reference answer; responses with another answer are dropped")
    wrong_help = "score: keep responses with a wrong answer; the score is 1 for right, 0 for wrong"
    add("--wrong-answers", choices=("drop", "score"), default="drop", help=wrong_help)
    add("--max-per-source", type=positive_int, metavar="N", help="keep at most N trajectories of each source")
    record_help = "drop longer lines without parsing them (default: 16 MiB)"
    add("--max-record-bytes", type=positive_int, metavar="N", help=record_help)


class _Said(logging.Handler):
    """Shows log messages as a command shows everything else."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), error=True)


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, handlers=[_Said()])
    if args.workers > 1 and not args.merge:
        start_forkserver(_PRELOADED)

    with imports():
        from megatron_iwsft.data.prepare.job_array import make_parts, merge_parts
        from megatron_iwsft.data.prepare.shard import shard_corpus, use_memory_again

    use_memory_again()
    settings = _settings(args)
    if args.merge:
        manifest = merge_parts(args.inputs, args.output, settings, restart=args.restart)
    elif args.array or args.share:
        task, tasks = _array_task(args.share)
        names = make_parts(
            args.inputs,
            args.output,
            settings,
            task=task,
            tasks=tasks,
            workers=args.workers,
            encoder=args.encoder,
            restart=args.restart,
        )
        found = ", ".join(names) or "no input file"
        say(f"{args.output}: parts of task {task} of {tasks} are complete: {found}")
        return
    else:
        manifest = shard_corpus(
            args.inputs, args.output, settings, workers=args.workers, encoder=args.encoder, restart=args.restart
        )
    _print_summary(args.output, manifest)


def _settings(args: argparse.Namespace) -> Any:
    """The `ShardSettings` that the options describe. Raises DataError for options that contradict each other."""
    from megatron_iwsft.data.prepare.filters import Curation
    from megatron_iwsft.data.prepare.shard import ShardSettings

    record = _record_format(args)
    if args.min_score is not None and not (record.score_fields or args.source_score or args.wrong_answers == "score"):
        raise DataError("--min-score needs scores: name their field with --score-field; without one every score is 1.")
    if args.wrong_answers == "score" and (record.score_fields or args.source_score):
        raise DataError("--wrong-answers score makes the score itself; leave out --score-field and --source-score.")
    return ShardSettings(
        tokenizer=args.tokenizer,
        template=args.template,
        record=record,
        shard_tokens=args.shard_tokens,
        curation=Curation(
            keep=args.keep,
            min_score=args.min_score,
            min_tokens=args.min_tokens,
            max_tokens=args.max_tokens,
            too_long=args.too_long,
            near_duplicates=args.near_duplicates,
            benchmarks=tuple(args.benchmark),
            benchmark_texts=args.benchmark_texts,
            answer_field=args.answer_field,
            wrong_answers=args.wrong_answers,
            max_per_source=args.max_per_source,
            max_record_bytes=args.max_record_bytes or Curation.max_record_bytes,
        ),
    )


def _record_format(args: argparse.Namespace) -> Any:
    from megatron_iwsft.data.prepare.records import PRESETS, RecordFormat

    if args.preset is not None and args.preset not in PRESETS:
        raise DataError(f"unknown preset {args.preset!r}; known: {', '.join(PRESETS)}.")
    base = PRESETS[args.preset] if args.preset else RecordFormat()
    bad = next((s for s in args.source_score if "=" not in s), None)
    if bad:
        raise DataError(f"--source-score {bad!r} is not of the form SOURCE=EXPRESSION.")
    rendering = replace(
        base.rendering,
        options=template_options(args.template_option),
        date=args.date or base.rendering.date,
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
        score_fields=tuple(args.score_field) or base.score_fields,
        layout=args.layout or base.layout,
        ignored_keys=tuple(args.ignore_key),
        plain_tokens=tuple(args.plain_token),
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
            raise DataError(f"--share {given!r} is not of the form I/N, as in 0/8.")
        return int(task), int(tasks)
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    missing = [name for name in names if not os.environ.get(name, "").isdigit()]
    if missing:
        raise DataError(
            f"--array needs {', '.join(missing)} in the environment. Submit with sbatch --array=0-7, or use --share I/N."
        )
    number, first, count = (int(os.environ[name]) for name in names)
    return number - first, count


def _print_summary(output: Path, manifest: dict[str, Any]) -> None:
    from megatron_iwsft.data.prepare.inspect import unused_keys

    counts = manifest["counts"]
    say(
        f"{output}: {counts['trajectories']:,} trajectories, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained; "
        f"{counts['dropped']:,} dropped"
    )
    for reason, n in manifest["dropped"].items():
        say(f"  {reason}: {n:,}")
    for reason, n in manifest.get("unchecked", {}).items():
        say(f"not checked: {reason}: {n:,}")
    for key, n in unused_keys(manifest):
        say(f"key {key} of messages is not used: {n:,} record{'s' * (n != 1)}")
