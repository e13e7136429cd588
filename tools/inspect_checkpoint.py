"""What a checkpoint holds and whether it is whole: tools/inspect_checkpoint.py CHECKPOINT | RUN_DIR [--verify]"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.utils.cli import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run directory: all of its checkpoints, and the latest in full"
    )
    parser.add_argument("--verify", action="store_true", help="re-hash every file, not only compare sizes")
    parser.add_argument("--config", action="store_true", help="print the resolved config too")
    args = parser.parse_args()

    from megatron_iwsft.checkpoint.summary import describe

    text, healthy = describe(args.checkpoint, verify=args.verify, config=args.config)
    print(text)
    return 0 if healthy else 1


if __name__ == "__main__":
    run_command(main)
