"""Plot the metrics of one or more runs on one self-contained HTML page, side by side.

example:
  iwsft report runs/sft runs/iw-sft --output report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory (run.dir of the config)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in the first run directory"
    )


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.report.page import write_report

    output = args.output or args.runs[0] / "report.html"
    say(write_report(args.runs, output))
    say(f"wrote {output}")
