"""Evaluate one or more models; with several, each is compared with the first, problem by problem.

  --benchmark FILE.jsonl   pass@k on problems with verifiable answers
  --corpus DIR             negative log-likelihood of a corpus
  --tasks NAME,…           lm-evaluation-harness tasks (needs lm-eval; unknown options are passed on to lm_eval)

  --run DIR --step N       what evaluation.answers of a run asks for, at one of its steps (docs/evaluation.md)

A run or checkpoint directory is exported to Hugging Face format first. Answers are kept in OUTPUT: repeat an interrupted command to
continue it.

example:
  iwsft evaluate --model runs/sft runs/iw-sft --benchmark gsm8k/test.jsonl --samples 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import add_template_options, positive_int, template_options
from megatron_iwsft.utils.text import LOADING, printable_line, say

ACCEPTS_UNKNOWN = True  # with --tasks they go to lm_eval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="DIR", help="Hugging Face, run or checkpoint directory")
    add(
        "--best",
        action="store_true",
        help="of runs with checkpoint.best: their best checkpoints instead of their latest",
    )
    add("--run", type=Path, metavar="RUN_DIR", help="instead of --model: what evaluation.answers of this run asks for")
    add("--step", type=int, metavar="N", help="with --run: at this step; its results belong to the run's report")
    add("--output", type=Path, default=Path("evaluation"), metavar="DIR", help="directory for answers and summaries")
    add("--limit", type=positive_int, metavar="N", help="use only the first N problems of each benchmark or task")
    add("--batch-size", type=positive_int, default=16, metavar="N", help="answers generated at once by transformers")
    add("--raw", action="store_true", help="no chat template")
    add("--corpus", metavar="DIR", help="corpus directory, made by iwsft shard")
    add("--tasks", metavar="NAME,…", help="lm-evaluation-harness tasks, separated by commas")
    add = parser.add_argument_group("benchmarks").add_argument
    add("--benchmark", nargs="+", default=[], metavar="FILE.jsonl", help="in GSM8K, MATH-500 or AIME format")
    add("--prompt-field", metavar="FIELD", help="default: question, problem or prompt")
    add("--answer-field", metavar="FIELD", help="default: answer, expected_answer or solution")
    add_template_options(add)
    add("--prompt-format", default="{prompt}", metavar="TEXT", help="text around the question, such as an instruction")
    records_help = (
        "also write the answers as records for iwsft shard: a model's own samples, to be filtered and trained on"
    )
    add("--records", type=Path, metavar="FILE.jsonl", help=records_help)
    add("--samples", type=positive_int, default=1, metavar="N", help="answers per problem")
    add("--k", type=positive_int, nargs="+", metavar="K", help="of pass@k; default: 1, 2, 4, … up to --samples")
    add("--temperature", type=float, help="default: 0 (greedy) for one sample, 0.6 for several")
    add("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling")
    add("--max-new-tokens", type=positive_int, default=1024, metavar="N", help="tokens per answer at most")
    add("--seed", type=int, default=0, help="of sampling")
    add("--backend", choices=("auto", "vllm", "transformers"), default="auto", help="auto: vLLM on a GPU if installed")
    add("--tensor", type=positive_int, default=1, metavar="N", help="GPUs per model, with vLLM")


def run(args: argparse.Namespace) -> None:
    _check(args)
    say(LOADING, error=True)

    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    if args.run:
        from megatron_iwsft.evaluate.in_run import answer_for

        found = answer_for(args.run, args.step)
        say("\n".join(f"step {args.step}: {name} {value:.4f}" for name, value in found.items()))
        return
    from megatron_iwsft.evaluate.run import find_models

    models = find_models(args.model, best=args.best)
    for benchmark in args.benchmark:
        _benchmark(args, models, benchmark)
    if args.corpus:
        from megatron_iwsft.evaluate.score import score_corpus

        for model in models:
            score = score_corpus(model.directory, args.corpus)
            counted = f"{score.tokens:,} tokens of {score.trajectories:,} trajectories"
            say(f"{printable_line(model.label)}: nll {score.nll:.6f} per trained token, {counted}")
    if args.tasks:
        from megatron_iwsft.evaluate.harness import run_harness

        for model in models:
            output = args.output / "lm_eval" / model.label
            run_harness(
                model.directory,
                args.tasks,
                output,
                batch_size=args.batch_size,
                limit=args.limit,
                raw=args.raw,
                more=args.unknown,
            )


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together; fill in the defaults that depend on others."""
    if args.unknown and not args.tasks:
        raise ConfigError(
            f"unknown arguments: {' '.join(args.unknown)} (only with --tasks are they passed on, to lm_eval). "
            "Remove them, or see `iwsft evaluate --help`."
        )
    if not args.run and not args.model:
        raise ConfigError(
            "iwsft evaluate: the following arguments are required: --model. Give it, or --run and --step; see `iwsft evaluate --help`."
        )
    if args.run and args.model:
        raise ConfigError("--run takes the model from the run. Leave out --model.")
    if (args.run is None) != (args.step is None):
        raise ConfigError("give --run and --step together: the answers are those of one step of a run.")
    if args.run and (args.benchmark or args.corpus or args.tasks):
        raise ConfigError("the run's config says what --run answers. Leave out --benchmark, --corpus and --tasks.")
    if not args.run and not (args.benchmark or args.corpus or args.tasks):
        raise ConfigError("nothing to evaluate on: give --benchmark, --corpus or --tasks.")
    if (args.date or args.template_option) and (args.raw or not args.benchmark):
        raise ConfigError(
            "--date and --template-option are for the chat template that asks the questions of --benchmark; "
            + ("--raw uses none." if args.raw else "there is no --benchmark.")
            + " Leave them out."
        )
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 0.6
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ConfigError(
            f"--temperature must be at least 0 and --top-p in (0, 1]; found {args.temperature:g} and {args.top_p:g}."
        )
    if args.temperature == 0 and args.samples > 1:
        raise ConfigError(
            f"--samples {args.samples} at temperature 0 would give the same answer each time. "
            "Set --temperature, or use one sample."
        )
    args.k = sorted(set(args.k or [2**i for i in range(args.samples.bit_length())]))
    if args.k[-1] > args.samples:
        raise ConfigError(f"--k must be at most --samples, which is {args.samples}; found {args.k[-1]}.")
    if args.records and len(args.benchmark) != 1:
        raise ConfigError(f"--records takes the answers to one --benchmark; {len(args.benchmark)} are given.")
    if len({Path(b).stem for b in args.benchmark}) < len(args.benchmark):
        raise ConfigError(
            "--benchmark: two benchmarks have the same file name, under which results are stored. Rename one."
        )


def _benchmark(args: argparse.Namespace, models: list, benchmark: str) -> None:
    from megatron_iwsft.data.template_defaults import TemplateVariables
    from megatron_iwsft.evaluate.benchmark import read_benchmark
    from megatron_iwsft.evaluate.generate import Sampling, make_generator
    from megatron_iwsft.evaluate.run import evaluate_model, table, write_records, write_summary

    problems = read_benchmark(
        benchmark, prompt_field=args.prompt_field, answer_field=args.answer_field, limit=args.limit
    )
    greedy = args.temperature == 0
    sampling = Sampling(args.samples, args.temperature, 1.0 if greedy else args.top_p, args.max_new_tokens, args.seed)
    settings = vars(sampling) | {"prompt_format": args.prompt_format, "raw": args.raw}
    variables = TemplateVariables(args.date, template_options(args.template_option))
    given = {"date": args.date, "template_options": args.template_option}
    settings |= {name: value for name, value in given.items() if value}

    def make(directory: Path):
        return make_generator(
            directory,
            sampling,
            backend=args.backend,
            batch_size=args.batch_size,
            tensor_parallel=args.tensor,
            wrapper=args.prompt_format,
            raw=args.raw,
            variables=variables,
        )

    output = args.output / Path(benchmark).stem
    results = [
        evaluate_model(model, problems, output, settings=settings, samples=args.samples, make=make) for model in models
    ]
    write_summary(output / "summary.json", results, args.k, settings)
    how = "greedy" if greedy else f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    say(
        f"\n{benchmark}: {len(problems):,} problems, {args.samples} answer{'s' * (args.samples > 1)} each ({how}), at most "
        f"{args.max_new_tokens:,} tokens; 95 % intervals; answers in {output}\n"
    )
    say(table(results, args.k))
    if args.records:
        say(f"wrote {write_records(args.records, output, models):,} records to {args.records}")
