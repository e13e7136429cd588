"""Estimate what each kind of reference and proposal costs: extra FLOPs relative to training, memory on the fullest GPU, host memory, disk.

example:
  iwsft reference-costs --model /models/Qwen2.5-32B --tokens 10000000 --epochs 5 --tensor 8 --context 2
"""

from __future__ import annotations

import argparse

from megatron_iwsft.cli.options import add_degrees
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="directory with a config.json")
    parser.add_argument("--tokens", type=positive_int, required=True, metavar="N", help="tokens in the corpus")
    parser.add_argument("--epochs", type=positive_int, required=True, metavar="N", help="passes over the corpus")
    parser.add_argument("--adapters", action="store_true", help="adapters are trained, not all weights (adapter.rank)")
    add_degrees(parser, "tensor", "pipeline", "expert", "context", "data")


def run(args: argparse.Namespace) -> None:
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.reference.cost import reference_costs

    arch = Architecture.from_directory(args.model)
    layout = ParallelLayout(
        tensor=args.tensor,
        pipeline=args.pipeline,
        expert=args.expert,
        context=args.context,
        data=args.data,
        sequence=args.tensor > 1,
    )
    broken = layout.broken_rule(arch)
    if broken:
        raise ConfigError(f"{broken}.")
    say(f"{'':20} {'FLOPs':>8} {'GB per GPU':>11} {'GB host':>9} {'GB disk':>9}")
    for cost in reference_costs(arch, layout, tokens=args.tokens, epochs=args.epochs, adapters=args.adapters):
        gpu, host, disk = (size / 1e9 for size in (cost.memory, cost.host, cost.disk))
        say(f"{cost.kind:20} {cost.flops:>+8.1%} {gpu:>11.2f} {host:>9.2f} {disk:>9.2f}")
