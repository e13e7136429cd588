"""What this machine has (CUDA, NCCL, Transformer Engine, apex, …), what that enables, what to install: tools/doctor.py"""

from __future__ import annotations

import argparse

from megatron_iwsft.errors import run_command


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()

    from megatron_iwsft.doctor import examine
    from megatron_iwsft.platform import quiet_megatron

    quiet_megatron()
    for finding in examine():
        print(f"{' ' if finding.ok else '!'} {finding.what:20} {finding.found:40} {finding.means}")


if __name__ == "__main__":
    run_command(main)
