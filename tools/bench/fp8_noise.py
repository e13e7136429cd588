"""What FP8's rounding does to log-probs, importance weights and losses, emulated on the CPU: tools/bench/fp8_noise.py [options]

The recipes are emulated by the local backend (`precision.fp8_emulation`, see model/fp8_emulation.py): their rounding, not a GPU's sums.
For a random model, or for --model DIR, a Hugging Face directory, each precision gives

  abs. Δ      |difference of a token's log-prob from bf16's|: mean, 99th percentile; policy and reference in different precision
  rows        the same from its own log-probs in rows of other trajectories; policy and cached reference in the same precision
  sequence    weights exp(mean Δ) of trajectories against a bf16 reference: standard deviation, and the value furthest from 1
  token       weights exp(Δ) of tokens, likewise
  step 0      mean |log-ratio| per token that a run starts with: with a cached reference of its own precision, for delayed with a live one
  own         weights of sequences, then of tokens, in the same precision, the reference's rows being of other trajectories: standard
              deviation and the value furthest from 1. Where they are as wide as a policy's own weights, these drown in noise
  loss        relative difference from bf16's loss in iw-SFT: mean of its absolute value over --steps steps, mean over the last 20

Matmuls of bf16 are computed in float32 and rounded, as on a GPU: many CPUs have no bf16 instructions, and are slow without.
Random models train on generated sums. --records FILE has records of your own (prompt, response).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.batch import Batch
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.utils.cli import run_command

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    **{recipe: {"dtype": "bf16", "fp8": recipe, "fp8_emulation": True} for recipe in FP8_RECIPES},
}
PRECISIONS["tensorwise-edges"] = PRECISIONS["tensorwise"] | {"bf16_first_layers": 1, "bf16_last_layers": 1}


_ATEN = torch.ops.aten
_MATMULS = {f.default: f.default for f in (_ATEN.mm, _ATEN.bmm, _ATEN.addmm)} | {_ATEN.mm.out: _ATEN.mm.default}


class Bf16ByFloat32(TorchDispatchMode):
    """Within it, matmuls of bfloat16 are computed in float32 and rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func not in _MATMULS or args[-1].dtype != torch.bfloat16:
            return func(*args, **options)
        out = options.pop("out", None)
        product = _MATMULS[func](*(x.float() for x in args), **options).bfloat16()
        return product if out is None else out.copy_(product)


@dataclass(frozen=True)
class Noise:
    """One precision. logprobs: of every trained token, by trajectory; rows: in rows of other trajectories; losses: of each step."""

    logprobs: list[np.ndarray]
    rows: list[np.ndarray]
    losses: list[float]
    first_ratio: float | None


def measure_all(platform: Any, configs: dict[str, dict[str, Any]], corpus_dir: str, steps: int) -> float:
    """Print each precision's row, bf16's first; returns the CPU time in s. Runs in a process of its own."""
    bf16: Noise | None = None
    begin = time.process_time()
    for name, config in configs.items():
        with redirect_stdout(sys.stderr), Bf16ByFloat32():
            noise = measure(config, corpus_dir, steps)
        bf16 = bf16 or noise
        print(row(name, noise, bf16), flush=True)
    return time.process_time() - begin


def measure(config: dict[str, Any], corpus_dir: str, steps: int) -> Noise:
    """Log-probs of the initial policy in two packings, then training."""
    from megatron_iwsft.config.loader import parse_config
    from megatron_iwsft.testing import comparable_metrics
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    config["data"]["corpus"] = corpus_dir
    checked = parse_config(json.dumps(config), [], where="fp8_noise")
    packed, rows = (trained_logprobs(checked, packing) for packing in ("best_fit", "none"))
    losses, ratio = [], None
    if steps:
        if checked.reference.source == "cached":
            precompute_reference(checked)
        train(checked)
        lines = comparable_metrics(Path(checked.run.dir))
        losses, ratio = [line["loss"] for line in lines], lines[0]["abs_log_ratio"]
    return Noise(packed, rows, losses, ratio)


def trained_logprobs(config: Config, packing: str) -> list[np.ndarray]:
    """The initial policy's log-probs of every trajectory's trained tokens, in the rows that a packing makes.

    Delayed scaling has seen the corpus once before, as it has after some steps of training.
    """
    from megatron_iwsft.model.gpt import forward
    from megatron_iwsft.reference.sidecar import logprobs_by_trajectory
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.setup import start
    from megatron_iwsft.train.step import run_schedule

    data = config.data.model_copy(update={"packing": packing})
    run = start(check(config.model_copy(update={"data": data}), world_size=1))
    chunks, builder, plan = run.build(run.policy), run.batches(run.mixture, run.sampler), run.sampler.covering()
    found: dict[int, np.ndarray] = {}

    def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)

        def keep(logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found.update({i: values for i, _, values in logprobs_by_trajectory(batch, logprobs[0])})
            return logprobs.sum(), torch.ones((), dtype=torch.int), {}

        return forward(model, batch), keep

    for _ in range(2 if config.precision.fp8 == "delayed" else 1):
        for index in range(plan.num_steps):
            batches = builder.from_packs(plan.step(index))
            with torch.no_grad():
                run_schedule(chunks, batches, forward_step, run.parallel, forward_only=True)
    return [found[i] for i in range(len(run.mixture))]


def furthest(weights: np.ndarray) -> float:
    return float(weights[np.abs(weights - 1).argmax()])


def row(name: str, noise: Noise, bf16: Noise) -> str:
    apart = [a - b for a, b in zip(noise.logprobs, bf16.logprobs, strict=True)]
    tokens, own = np.concatenate(apart), np.concatenate(noise.logprobs) - np.concatenate(noise.rows)
    sequence, token = np.exp([x.mean() for x in apart]), np.exp(tokens)
    repeated = np.exp([(a - b).mean() for a, b in zip(noise.logprobs, noise.rows, strict=True)])
    cells = [
        name,
        f"{np.abs(tokens).mean():.1e}, {np.percentile(np.abs(tokens), 99):.1e}",
        f"{np.abs(own).mean():.1e}, {np.percentile(np.abs(own), 99):.1e}",
        f"{sequence.std():.1e}, {furthest(sequence):.4f}",
        f"{token.std():.1e}, {furthest(token):.3f}",
        f"{repeated.std():.1e}, {furthest(repeated):.4f}; {np.exp(own).std():.1e}, {furthest(np.exp(own)):.3f}",
    ]
    if noise.losses:
        relative = [(a - b) / b for a, b in zip(noise.losses, bf16.losses, strict=True)]
        tail = statistics.mean(relative[-20:])
        cells += [f"{noise.first_ratio:.1e}", f"{statistics.mean(map(abs, relative)):.2%}, {tail:+.2%}"]
    else:
        cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def make_corpus(args: argparse.Namespace, directory: Path) -> Path:
    from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
    from megatron_iwsft.testing import worked_sums

    if args.model is None and args.records is None:
        return worked_sums(directory, args.count)
    records = directory / "records.jsonl"
    if args.records is not None:
        lines = Path(args.records).read_text(encoding="utf-8").splitlines()[: args.count]
    else:
        lines = [json.dumps(r) for r in arithmetic_records(args.count, ArithmeticSettings(digits=4), seed=1)]
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    form = RecordFormat(prompt_field=args.prompt_field, response_fields=(args.response_field,))
    shard_corpus([records], directory / "corpus", ShardSettings(str(args.model), record=form), show_progress=False)
    return directory / "corpus"


def run_config(args: argparse.Namespace, directory: Path, name: str) -> dict[str, Any]:
    shape = {
        "model_type": "qwen2",
        "vocab_size": 400,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 64,
        "intermediate_size": args.hidden * 11 // 4,
        "initializer_range": args.initializer_range,
    }
    return {
        "run": {"name": name, "dir": str(directory / name), "seed": 3},
        "model": {"hf": args.model} if args.model else {"config": shape},
        "data": {
            "corpus": "",
            "seq_length": args.seq_length,
            "global_batch_size": args.batch,
            "max_steps": max(args.steps, 1),
        },
        "objective": {"name": "iw_sft"},
        "reference": {"source": "live" if PRECISIONS[name].get("fp8") == "delayed" else "cached"},
        "precision": PRECISIONS[name],
        "optimizer": {"lr": args.lr},
        "checkpoint": {"every": 0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face directory (default: a random model)")
    add("--hidden", type=int, default=256, help="of the random model (default: 256)")
    add("--layers", type=int, default=4, help="of the random model (default: 4)")
    add("--initializer-range", type=float, default=0.02, help="of the random model (default: 0.02)")
    add("--records", help="JSONL records (default: generated sums)")
    add("--prompt-field", default="prompt")
    add("--response-field", default="response")
    add("--count", type=int, default=400, help="trajectories (default: 400)")
    add("--seq-length", type=int, default=256)
    add("--batch", type=int, default=2, help="rows per step (default: 2)")
    add("--steps", type=int, default=200, help="training steps; 0: log-probs only (default: 200)")
    add("--lr", type=float, default=1e-3)
    add("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS), help="bf16 is always measured")
    args = parser.parse_args()
    if args.records and not args.model:
        parser.error("--records needs --model: their text is encoded with the model's tokenizer")

    from megatron_iwsft.distributed.spawn import run_job

    os.environ["IWSFT_DEVICE"] = "cpu"
    model = args.model or f"random, {args.layers} layers of {args.hidden}, initializer range {args.initializer_range:g}"
    with tempfile.TemporaryDirectory(prefix="fp8-noise-") as name:
        corpus = make_corpus(args, Path(name))
        tokens = json.loads((corpus / "manifest.json").read_text())["counts"]
        print(f"FP8 emulated on the CPU; {model}; {tokens}; {args.steps} steps\n")
        print(
            "| precision | abs. Δ | rows | sequence | token | own | step 0 | loss |\n|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        precisions = dict.fromkeys(["bf16", *args.precision])
        configs = {precision: run_config(args, Path(name), precision) for precision in precisions}
        (cpu_s,) = run_job(measure_all, 1, configs, str(corpus), args.steps)
    print(f"\n{cpu_s:.0f} CPU seconds")


if __name__ == "__main__":  # spawned processes import this file
    run_command(main)
