"""What each kind of reference and proposal costs: tools/reference_costs.py --model HF_DIR --tokens N --epochs E [--tensor T …]"""

from __future__ import annotations

import argparse

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.cli import positive_int, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--tokens", type=positive_int, required=True, help="tokens in the corpus")
    parser.add_argument("--epochs", type=positive_int, required=True)
    for degree in ("tensor", "pipeline", "expert", "context", "data"):
        parser.add_argument(f"--{degree}", type=positive_int, default=1, help=f"{degree}-parallel degree")
    args = parser.parse_args()

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
    broken = layout.broken_rule_for(arch)
    if broken:
        raise ConfigError(f"{broken}.")
    print(f"{'':20} {'FLOPs':>8} {'GB a GPU':>9} {'GB of host':>11} {'GB on disk':>11}")
    for cost in reference_costs(arch, layout, tokens=args.tokens, epochs=args.epochs):
        print(
            f"{cost.kind:20} {cost.flops:>+8.1%} {cost.memory / 1e9:>9.2f} {cost.host / 1e9:>11.2f} {cost.disk / 1e9:>11.2f}"
        )


if __name__ == "__main__":
    run_command(main)
