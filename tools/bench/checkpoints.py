"""Time that a checkpoint stalls training, for synchronous and asynchronous saves: python tools/bench/checkpoints.py [--hidden 1024]

Two data-parallel processes under torchrun train a randomly initialised model for a few steps and save twice; the times are those in
logs/events.jsonl. Then time and peak memory of the optimizer's sharded state dict, ours (checkpoint/optimizer_state.py) and
Megatron-Core's (`fully_reshardable`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.cli import run_command

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--output", type=Path, help="directory for the checkpoints (default: the system's temporary directory)"
    )
    args = parser.parse_args()

    from megatron_iwsft.testing import run_distributed

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
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory(dir=args.output) as directory:
            train(Path(directory), model, asynchronous=asynchronous)
    for how, (seconds, grown) in run_distributed(state_dicts, 2, model)[0].items():
        print(f"optimizer state dict, {how}: {seconds:.2f} s, {grown / 2**20:,.0f} MiB more per process")


def train(directory: Path, model: dict[str, Any], *, asynchronous: bool) -> None:
    """Train with two processes in `directory` and print the time of each save."""
    from megatron_iwsft.testing import worked_sums

    config = {
        "run": {"name": "stall", "dir": f"{directory}/run", "device": "cpu"},
        "model": {"config": model},
        "data": {
            "corpus": str(worked_sums(directory, 100)),
            "seq_length": 512,
            "global_batch_size": 2,
            "max_steps": 8,
        },
        "objective": {"name": "sft"},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"every": 4, "keep": 1, "asynchronous": asynchronous},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config))
    launch = [sys.executable, "-m", "megatron_iwsft.distributed.torchrun", "--nproc_per_node", "2", "launch/train.py"]
    done = subprocess.run([*launch, "--config", path], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"training failed:\n{done.stderr}")
    events = (directory / "run" / "logs" / "events.jsonl").read_text().splitlines()
    for event in map(json.loads, events):
        if event["event"] == "saved":
            how = "asynchronous" if asynchronous else "synchronous"
            print(
                f"step {event['step']}, {how}: {event['bytes'] / 1e9:.2f} GB, training stalled for {event['stall_s']:.2f} s, "
                f"complete after {event['total_s']:.2f} s",
                flush=True,
            )


def peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def state_dicts(platform: Any, model: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Implementation → (seconds, growth of this process's peak memory in bytes). Collective."""
    import torch

    from megatron_iwsft.checkpoint.optimizer_state import sharded_optimizer_state
    from megatron_iwsft.config.schema import Optimizer
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

    architecture = Architecture.from_hf(model, where="the bench")
    parallel = platform.parallel()
    chunks = build_model(architecture, parallel, platform, ModelSettings())
    load_weights(chunks, RandomInit(architecture, 0), parallel)
    wrapped = wrap_for_gradients(chunks, Optimizer())
    optimizer = build_optimizer(wrapped, Optimizer(), torch.float32)
    metadata = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
    models = {
        f"{i}.{k}": v for i, chunk in enumerate(wrapped) for k, v in chunk.sharded_state_dict(metadata=metadata).items()
    }
    sharded_optimizer_state(optimizer, models)  # the first call creates the states
    found = {}
    for how, make in {
        "ours": lambda: sharded_optimizer_state(optimizer, models),
        "Megatron-Core's": lambda: optimizer.sharded_state_dict(models, metadata=metadata),
    }.items():
        torch.distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, started = peak_memory(), time.perf_counter()
        state = make()
        found[how] = time.perf_counter() - started, peak_memory() - before
        del state
    return found


if __name__ == "__main__":
    run_command(main)
