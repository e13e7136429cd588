"""Time and peak memory of the log-prob operator beside other ways to the same numbers: tools/bench/logprob.py [options]

Every implementation gets the same inputs in the same run. The floor is three matrix products at the rate measured here (logits,
their two gradients; one for forward alone): no implementation that computes the gradients can be faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import run_command


@dataclass(frozen=True)
class Case:
    implementation: str
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    trained: float


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes. memory: the peak, less inputs and gradients; product: one matrix product of this size."""

    forward: float
    both: float
    memory: int
    product: float


def ours(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    return vocab_parallel_logprob(hidden, weight, targets, group=group, vocab_size=weight.shape[0] * group.size())


def full_logits(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    import torch

    logits = (hidden @ weight.t()).float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def authors(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    """The released script's way: log-softmax of all logits, then a gather."""
    import torch

    logprobs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)


def megatron_fused(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits = (hidden @ weight.t()).unsqueeze(1)
    loss = fused_vocab_parallel_cross_entropy(logits, targets.clamp(min=0)[:, None], group)
    return -loss[:, 0] * (targets >= 0)


def liger(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    """Its gradient is computed in forward, for a sum: no weights of a token's own."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def cut_cross_entropy(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


# name → (function, needs a GPU, knows tensor parallelism)
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "ours": (ours, False, True),
    "full-logits": (full_logits, False, False),
    "authors": (authors, False, False),
    "megatron-fused": (megatron_fused, False, True),
    "liger": (liger, True, False),
    "cut-cross-entropy": (cut_cross_entropy, True, False),
}


def measure(platform: Any, cases: list[Case]) -> list[Measured | str]:
    """In every process: each case, or why it could not be run."""
    import torch

    if not platform.is_cuda:
        torch._dynamo.config.disable = True  # Megatron-Core's is compiled, which on CPU takes a C++ compiler
    group = platform.parallel(tensor=platform.world_size).tp
    out: list[Measured | str] = []
    for case in cases:
        try:
            out.append(_measure(platform, group, case))
        except (ImportError, RuntimeError) as error:  # not installed; out of memory
            out.append(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
        if platform.is_cuda:
            torch.cuda.empty_cache()
    return out


def _measure(platform: Any, group: Any, case: Case) -> Measured:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    generator = torch.Generator(platform.device).manual_seed(0)
    options = dict(device=platform.device, generator=generator)
    hidden = torch.randn(case.tokens, case.hidden, **options).to(dtype).requires_grad_()
    rows = case.vocabulary // group.size()
    weight = (torch.randn(rows, case.hidden, **options) * case.hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, case.vocabulary, (case.tokens,), **options)
    targets[torch.rand(case.tokens, **options) >= case.trained] = -100
    grad = torch.randn(case.tokens, **options)
    function = IMPLEMENTATIONS[case.implementation][0]
    platform.synchronize()
    before = _memory(platform)

    def forward() -> None:
        with torch.no_grad():
            function(hidden, weight, targets, group)

    def both() -> None:
        hidden.grad = weight.grad = None
        logprobs = function(hidden, weight, targets, group)
        logprobs.backward(grad if logprobs.ndim else None)

    both()
    platform.synchronize()
    memory = _peak(platform) - before - hidden.grad.nbytes - weight.grad.nbytes
    product = _seconds(platform, lambda: torch.mm(hidden.detach(), weight.detach().t()))
    return Measured(_seconds(platform, forward), _seconds(platform, both), memory, product)


def _memory(platform: Any) -> int:
    """Bytes held now. The peak starts again from here."""
    if platform.is_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(platform)


def _peak(platform: Any) -> int:
    """Most bytes held since `_memory`."""
    if platform.is_cuda:
        return platform.peak_memory()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _seconds(platform: Any, function: Callable[[], Any], *, budget: float = 3.0, most: int = 30) -> float:
    """Median of several runs after one to warm up."""
    function()
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        platform.synchronize()
        started = time.perf_counter()
        function()
        platform.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1], help="tensor-parallel degrees")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--trained", type=float, nargs="+", default=[1.0], help="shares of positions trained on")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    args = parser.parse_args()

    import torch

    from megatron_iwsft.testing import run_distributed

    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread a process"
    print(f"{where}; torch {torch.__version__}")
    print(
        f"{'':18} {'TP':>2} {'T':>6} {'V':>7} {'H':>5} {'':4} {'trained':>7} {'forward':>9} {'of floor':>8} {'both':>9} {'of floor':>8} "
        f"{'memory':>8}"
    )
    sizes = itertools.product(args.tensor, args.tokens, args.vocabulary, args.hidden, args.dtype, args.trained)
    for tensor, *size in sizes:
        names = [
            name
            for name in args.only
            if (args.device == "cuda" or not IMPLEMENTATIONS[name][1]) and (tensor == 1 or IMPLEMENTATIONS[name][2])
        ]
        cases = [Case(name, *size) for name in names]
        if args.device == "cuda":
            found = run_distributed(measure, tensor, cases, device="cuda")[0]
        else:  # a process each: its resident memory only ever grows
            found = [run_distributed(measure, tensor, [case])[0][0] for case in cases]
        for case, result in zip(cases, found, strict=True):
            print(_row(tensor, case, result), flush=True)


def _row(tensor: int, case: Case, result: Measured | str) -> str:
    head = (
        f"{case.implementation:18} {tensor:>2} {case.tokens:>6} {case.vocabulary:>7} {case.hidden:>5} {case.dtype:4} "
        f"{case.trained:>7.0%} "
    )
    if isinstance(result, str):
        return head + result
    floor = result.product * case.trained
    return head + (
        f"{result.forward * 1e3:>7.1f}ms {floor / result.forward:>8.0%} {result.both * 1e3:>7.1f}ms "
        f"{3 * floor / result.both:>8.0%} {result.memory / 2**20:>5.0f}MiB"
    )


if __name__ == "__main__":  # the processes that it starts import this file
    run_command(main)
