"""What this machine has, what that enables, what to install, and which paths a run takes: tools/doctor.py"""

from __future__ import annotations

import argparse

from megatron_iwsft.utils.cli import run_command


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()

    from megatron_iwsft.distributed.context import quiet_megatron
    from megatron_iwsft.distributed.doctor import Finding, examine, paths

    quiet_megatron()

    def show(findings: list[Finding]) -> None:
        for finding in findings:
            line = f"{' ' if finding.ok else '!'} {finding.what:20} {finding.found:40} {finding.means}"
            print(line.rstrip(), flush=True)

    show(examine())
    print("\nA run here takes")
    show(paths())


if __name__ == "__main__":
    run_command(main)
