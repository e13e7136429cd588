"""How long training stands still for a checkpoint: at once, in the background, and there without gathering optimizer states
(`checkpoint.reshardable: false`): python tools/bench/checkpoints.py [--hidden 1024]

Two processes under torchrun train a model from random weights for a few steps, saving twice; prints what logs/events.jsonl says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_iwsft.errors import run_command

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, help="where the checkpoints go (default: the system's temporary directory)"
    )
    args = parser.parse_args()

    from megatron_iwsft.testing import worked_sums

    model = {
        "model_type": "qwen2",
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
        "vocab_size": 400,
        "max_position_embeddings": 512,
    }
    for asynchronous, reshardable in ((False, True), (True, True), (True, False)):
        with tempfile.TemporaryDirectory(dir=args.output) as directory:
            config = {
                "run": {"name": "stall", "dir": f"{directory}/run", "device": "cpu"},
                "model": {"config": model},
                "data": {
                    "corpus": str(worked_sums(Path(directory), 100)),
                    "seq_length": 512,
                    "global_batch_size": 2,
                    "max_steps": 8,
                },
                "objective": {"name": "sft"},
                "precision": {"dtype": "fp32"},
                "checkpoint": {"every": 4, "keep": 1, "asynchronous": asynchronous, "reshardable": reshardable},
            }
            path = Path(directory) / "config.yaml"
            path.write_text(json.dumps(config))
            command = [sys.executable, "-m", "megatron_iwsft.torchrun", "--nproc_per_node", "2", "launch/train.py"]
            done = subprocess.run([*command, "--config", path], cwd=ROOT, text=True, capture_output=True)
            if done.returncode:
                sys.exit(f"training failed:\n{done.stderr}")
            events = (Path(directory) / "run" / "logs" / "events.jsonl").read_text().splitlines()
            for event in map(json.loads, events):
                if event["event"] == "saved":
                    how = "in the background" if asynchronous else "at once"
                    how += "" if reshardable else ", nothing gathered"
                    print(
                        f"step {event['step']}, {how}: {event['bytes'] / 1e9:.2f} GB, training stood still for "
                        f"{event['stall_s']:.2f} s, whole after {event['total_s']:.2f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    run_command(main)
