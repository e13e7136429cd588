"""Show what this machine has, what that enables, what to install for more, and which implementations runs use.

Lines that start with ! name something missing. With --gpu, also run short checks: a matmul in bf16 and in each FP8 recipe, each Triton
kernel, attention, a collective per process group, a training step of each backend. Exit status 1 if one fails.

examples:
  iwsft doctor
  iwsft doctor --gpu
"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", action="store_true", help="run short checks on the GPU, or where there is none, on the CPU"
    )
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="S", help="with --gpu: seconds that each check may take"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_iwsft.distributed.doctor import Finding, examine, paths
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()

    def show(findings: list[Finding]) -> None:
        for finding in findings:
            line = f"{' ' if finding.ok else '!'} {finding.what:20} {finding.found:40} {finding.means}"
            say(line.rstrip())

    show(examine())
    say("\nImplementations used on this machine")
    show(paths())
    return _check(args.limit) if args.gpu else 0


def _check(limit_s: float) -> int:
    from megatron_iwsft.train.machine_checks import run_checks

    say("\nChecks on this machine")
    failures = []
    for outcome in run_checks(limit_s=limit_s):
        mark = "!" if outcome.status == "failed" else " "
        detail = "see below" if outcome.status == "failed" else outcome.detail
        say(f"{mark} {outcome.name:34} {outcome.status:8} {outcome.seconds:6.1f} s  {detail}")
        if outcome.status == "failed":
            failures.append(outcome)
    for outcome in failures:
        say(f"\n{outcome.name} failed:\n{outcome.detail}")
    return 1 if failures else 0
