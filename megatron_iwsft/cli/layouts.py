"""List the parallel layouts that fit a model, with memory per GPU and pipeline bubble. Estimates: arXiv 2205.05198 and 2104.04473.

example:
  iwsft layouts --model /models/Qwen2.5-32B --gpus 16 --seq-length 22528 --global-batch-size 16 --memory 80
"""

from __future__ import annotations

import argparse

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory (only config.json is read)")
    add("--gpus", type=positive_int, required=True, metavar="N", help="GPUs in the job")
    add("--gpus-per-node", type=positive_int, default=8, metavar="N", help="tensor parallelism stays within a node")
    add("--seq-length", type=positive_int, required=True, metavar="N", help="tokens per packed sequence")
    add("--micro-batch-size", type=positive_int, default=1, metavar="N", help="sequences per micro-batch")
    add("--global-batch-size", type=positive_int, required=True, metavar="N", help="sequences per optimizer step")
    add(
        "--memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of one GPU; layouts that need more are left out",
    )
    add(
        "--backend",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="the local one keeps whole keys and values under context parallelism",
    )
    add(
        "--adapter-rank",
        type=positive_int,
        metavar="N",
        help="train adapters of this rank on all projections but experts'",
    )
    add("--recompute", choices=("none", "full"), default="none", help="activation recomputation")
    add("--limit", type=positive_int, default=20, metavar="N", help="rows to print at most")


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.distributed.parallel_layout import valid_layouts
    from megatron_iwsft.hf.adapters import AdapterSettings
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.model.memory import cost

    arch = Architecture.from_directory(args.model)
    adapters = None
    if args.adapter_rank is not None:
        adapters = AdapterSettings.of(arch, rank=args.adapter_rank, alpha=1.0, targets=None)
    rows = []
    for layout in valid_layouts(arch, args.gpus, gpus_per_node=args.gpus_per_node):
        if args.global_batch_size % (args.micro_batch_size * layout.data):
            continue
        micro_batches = args.global_batch_size // (args.micro_batch_size * layout.data)
        if layout.virtual_pipeline and micro_batches % layout.pipeline:
            continue
        estimate = cost(
            arch,
            layout,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            micro_batches=micro_batches,
            recompute=args.recompute,
            local=args.backend == "local",
            adapters=adapters,
        )
        if estimate.total <= args.memory * 1e9:
            rows.append((layout, micro_batches, estimate))
    if not rows:
        raise ConfigError(
            f"no layout of {args.gpus} GPUs fits this model in {args.memory:g} GB each at sequence length {args.seq_length}. "
            "Use more GPUs, --recompute full, or a shorter sequence."
        )
    # The least model parallelism first: it communicates least.
    rows.sort(key=lambda row: (row[2].bubble, row[0].tensor * row[0].context * row[0].pipeline))
    shown = rows[: args.limit]
    width = max(len(layout.describe()) for layout, _, _ in shown)
    say(
        f"{'layout':{width}} {'micro-batches':>13} {'weights':>9} {'gradients':>9} {'optimizer':>9} {'activations':>11} {'GB':>7} "
        f"{'bubble':>7}"
    )
    for layout, micro_batches, estimate in shown:
        sizes = (estimate.parameters, estimate.gradients, estimate.optimizer, estimate.activations, estimate.total)
        weights, gradients, optimizer, activations, total = (f"{size / 1e9:.1f}" for size in sizes)
        say(
            f"{layout.describe():{width}} {micro_batches:>13} {weights:>9} {gradients:>9} {optimizer:>9} {activations:>11} {total:>7} "
            f"{estimate.bubble:>7.1%}"
        )
    say(f"{len(rows)} layouts fit. Sizes in GB per GPU; estimates as in megatron_iwsft/model/memory.py.")
