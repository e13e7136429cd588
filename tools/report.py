"""Runs → one self-contained HTML page: tools/report.py RUN_DIR… [--output FILE.html]"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run directory")
    args = parser.parse_args()

    from megatron_iwsft.report.page import write_report

    output = args.output or args.runs[0] / "report.html"
    print(write_report(args.runs, output))
    print(f"wrote {output}")


if __name__ == "__main__":
    run_command(main)
