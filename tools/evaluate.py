"""Did it get better?

tools/evaluate.py --model DIR [DIR …] --benchmark FILE.jsonl …   pass@k on problems whose answers can be checked
tools/evaluate.py --model DIR [DIR …] --corpus DIR               negative log-likelihood of a corpus
tools/evaluate.py --model DIR [DIR …] --tasks NAME,…             lm-evaluation-harness's suites, where it is installed

A model is a Hugging Face directory, or a run or checkpoint directory, which is exported first. With several, each is compared with
the first, problem by problem. Every answer is kept in OUTPUT; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int, run_command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, metavar="DIR")
    parser.add_argument(
        "--benchmark", nargs="+", default=[], metavar="FILE.jsonl", help="in GSM8K, MATH-500 or AIME format"
    )
    parser.add_argument("--corpus", metavar="DIR", help="corpus directory of tools/shard_corpus.py")
    parser.add_argument("--tasks", help="of lm-evaluation-harness, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="default: evaluation/")
    parser.add_argument("--limit", type=positive_int, help="only the first so many problems of each")
    parser.add_argument("--samples", type=positive_int, default=1, help="answers to each problem (default: 1)")
    parser.add_argument(
        "--k", type=positive_int, nargs="+", help="of pass@k; default: 1, 2, 4, … up to the number of samples"
    )
    parser.add_argument("--temperature", type=float, help="default: 0 (greedy) for one sample, 0.6 for several")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="answers generated at once by transformers")
    parser.add_argument("--tensor-parallel", type=positive_int, default=1, help="GPUs that vLLM spreads a model over")
    parser.add_argument("--prompt-format", default="{prompt}", help="text around the question, such as an instruction")
    parser.add_argument("--raw", action="store_true", help="without the chat template")
    parser.add_argument("--prompt-field", help="default: question, problem or prompt")
    parser.add_argument("--answer-field", help="default: answer, expected_answer or solution")
    args, args.more = parser.parse_known_args()
    if args.more and not args.tasks:
        parser.error(f"unrecognized arguments: {' '.join(args.more)} (with --tasks they would go to lm_eval)")
    if not (args.benchmark or args.corpus or args.tasks):
        parser.error("one of --benchmark, --corpus and --tasks is needed")
    for name in ("samples", "max_new_tokens", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.temperature is None:
        args.temperature = 0.0 if args.samples == 1 else 0.6
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature must be at least 0 and --top-p in (0, 1]")
    if args.temperature == 0 and args.samples > 1:
        parser.error("several samples at temperature 0 would all be the same answer")
    args.k = sorted(set(args.k or [2**i for i in range(args.samples.bit_length())]))
    if not 1 <= args.k[0] <= args.k[-1] <= args.samples:
        parser.error(f"--k must be between 1 and --samples, which is {args.samples}")
    if len({Path(b).stem for b in args.benchmark}) < len(args.benchmark):
        parser.error("results lie under the benchmarks' names, and two have the same one")
    return args


def main() -> None:
    args = _arguments()

    from megatron_iwsft.distributed.context import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.evaluate.run import find_models

    models = find_models(args.model)
    for benchmark in args.benchmark:
        _benchmark(args, models, benchmark)
    if args.corpus:
        from megatron_iwsft.evaluate.score import score_corpus

        for model in models:
            score = score_corpus(model.directory, args.corpus)
            print(
                f"{model.label}: nll {score.nll:.6f} per trained token, {score.tokens:,} tokens of {score.trajectories:,} trajectories"
            )
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
                more=args.more,
            )


def _benchmark(args: argparse.Namespace, models: list, benchmark: str) -> None:
    from megatron_iwsft.evaluate.benchmark import read_benchmark
    from megatron_iwsft.evaluate.generate import Sampling, make_generator
    from megatron_iwsft.evaluate.run import evaluate_model, table, write_summary

    problems = read_benchmark(
        benchmark, prompt_field=args.prompt_field, answer_field=args.answer_field, limit=args.limit
    )
    greedy = args.temperature == 0
    sampling = Sampling(args.samples, args.temperature, 1.0 if greedy else args.top_p, args.max_new_tokens, args.seed)
    settings = vars(sampling) | {"prompt_format": args.prompt_format, "raw": args.raw}

    def make(directory: Path):
        return make_generator(
            directory,
            sampling,
            backend=args.backend,
            batch_size=args.batch_size,
            tensor_parallel=args.tensor_parallel,
            wrapper=args.prompt_format,
            raw=args.raw,
        )

    output = args.output / Path(benchmark).stem
    results = [
        evaluate_model(model, problems, output, settings=settings, samples=args.samples, make=make) for model in models
    ]
    write_summary(output / "summary.json", results, args.k, settings)
    how = "greedy" if greedy else f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    print(
        f"\n{benchmark}: {len(problems):,} problems, {args.samples} answer{'s' * (args.samples > 1)} each ({how}), at most "
        f"{args.max_new_tokens:,} tokens; 95 % intervals; answers in {output}\n"
    )
    print(table(results, args.k))


if __name__ == "__main__":
    run_command(main)
