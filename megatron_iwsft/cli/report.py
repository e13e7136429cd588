"""Show one or more runs on one self-contained HTML page: the verdict first, then curves, weights, answers and events.

Results of `iwsft evaluate` are found in and beside the runs, or with --evaluation. Without them the page cannot say which run is better.

example:
  iwsft report runs/sft runs/iw-sft --output report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory (run.dir of the config)")
    add("--output", type=Path, metavar="FILE.html", help="default: report.html in the first run directory")
    evaluation_help = "an output of iwsft evaluate; repeatable (default: evaluation/ in and beside the runs, and here)"
    add("--evaluation", type=Path, action="append", metavar="DIR", help=evaluation_help)
    trajectories_help = (
        "score N trajectories of each run with weights, and show those with the largest and smallest; needs a Hugging Face "
        "export of the run and a cached reference, and N forward passes"
    )
    add("--trajectories", type=positive_int, default=0, metavar="N", help=trajectories_help)


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.report.page import write_report

    output = args.output or args.runs[0] / "report.html"
    say(write_report(args.runs, output, evaluations=args.evaluation, trajectories=args.trajectories))
    say(f"wrote {output}")
