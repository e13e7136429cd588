"""Show what this machine has, what that enables, what to install for more, and which implementations runs use.

Lines that start with ! name something missing.

example:
  iwsft doctor
"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> None:
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
