"""Time and peak memory of the log-prob operator and of other implementations: tools/bench/logprob.py [options]

All implementations get the same inputs, in the same run. Baseline: the matmuls alone (three for forward and backward, one for forward),
timed in the same run; "of matmul" is the baseline's time over the implementation's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.cli import run_command


@dataclass(frozen=True)
class Size:
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    trained: float


def ours(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    return vocab_parallel_logprob(hidden, weight, targets, group=group, vocab_size=weight.shape[0] * group.size())


def full_logits(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    import torch

    logits = (hidden @ weight.t()).float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def authors(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    """As in the paper's released script: log-softmax of the full logits, then a gather."""
    import torch

    logprobs = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)


def megatron_fused(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    logits = (hidden @ weight.t()).unsqueeze(1)
    loss = fused_vocab_parallel_cross_entropy(logits, targets.clamp(min=0)[:, None], group)
    return -loss[:, 0] * (targets >= 0)


def liger(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    """Computes its gradient in forward, for the sum over tokens: no per-token weights."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def cut_cross_entropy(hidden: Any, weight: Any, targets: Any, group: Any) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


# name → (function, needs a GPU, supports tensor parallelism)
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "ours": (ours, False, True),
    "full-logits": (full_logits, False, False),
    "authors": (authors, False, False),
    "megatron-fused": (megatron_fused, False, True),
    "liger": (liger, True, False),
    "cut-cross-entropy": (cut_cross_entropy, True, False),
}


@dataclass(frozen=True)
class Inputs:
    """hidden [T, H], weight [V/tp, H], targets int64 [T], and grad, the gradient of the log-probs, float32 [T]."""

    hidden: Any
    weight: Any
    targets: Any
    grad: Any

    @staticmethod
    def of(size: Size, platform: Any, ranks: int) -> Inputs:
        import torch

        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[size.dtype]
        generator = torch.Generator(platform.device).manual_seed(0)
        options = dict(device=platform.device, generator=generator)
        hidden = torch.randn(size.tokens, size.hidden, **options).to(dtype).requires_grad_()
        rows = size.vocabulary // ranks
        weight = (torch.randn(rows, size.hidden, **options) * size.hidden**-0.5).to(dtype).requires_grad_()
        targets = torch.randint(0, size.vocabulary, (size.tokens,), **options)
        targets[torch.rand(size.tokens, **options) >= size.trained] = -100
        return Inputs(hidden, weight, targets, torch.randn(size.tokens, **options))

    def forward(self, name: str, group: Any) -> None:
        import torch

        with torch.no_grad():
            IMPLEMENTATIONS[name][0](self.hidden, self.weight, self.targets, group)

    def both(self, name: str, group: Any) -> None:
        self.hidden.grad = self.weight.grad = None
        logprobs = IMPLEMENTATIONS[name][0](self.hidden, self.weight, self.targets, group)
        logprobs.backward(self.grad if logprobs.ndim else None)

    def product(self) -> None:
        import torch

        torch.mm(self.hidden.detach(), self.weight.detach().t())


def _start(platform: Any) -> Any:
    """The tensor-parallel group of all processes."""
    import torch

    if not platform.is_cuda:
        torch._dynamo.config.disable = (
            True  # Megatron-Core's loss uses torch.compile, which needs a C++ compiler on CPU
        )
    return platform.parallel(tensor=platform.world_size).tp


def peaks(platform: Any, size: Size, names: list[str]) -> dict[str, int | str]:
    """Peak bytes of forward and backward beyond inputs and gradients, or the error. Runs in every process."""
    group = _start(platform)
    inputs, out = Inputs.of(size, platform, group.size()), {}
    for name in names:
        try:
            if platform.is_cuda:  # warm up: exclude one-time allocation, compilation and autotuning
                inputs.both(name, group)
                inputs.hidden.grad = inputs.weight.grad = None
            before = _memory(platform)
            inputs.both(name, group)
            platform.synchronize()
            out[name] = _peak(platform) - before - inputs.hidden.grad.nbytes - inputs.weight.grad.nbytes
        except Exception as error:  # not installed, out of memory, or inputs that the implementation does not support
            if not isinstance(error, ImportError):
                traceback.print_exc()
            out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        inputs.hidden.grad = inputs.weight.grad = None
    return out


def times(platform: Any, size: Size, names: list[str], budget: float) -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds of one matmul, and of each implementation's forward alone and forward with backward. Runs in every process.

    Medians over rounds; in each round all implementations take turns, so that changes in machine speed affect all alike.
    """
    group = _start(platform)
    inputs = Inputs.of(size, platform, group.size())
    turns: dict[tuple[str, str], Callable[[], None]] = {("", "product"): inputs.product}
    for name in names:
        turns[name, "forward"] = partial(inputs.forward, name, group)
        turns[name, "both"] = partial(inputs.both, name, group)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in turns}
    rounds, begun = 0, time.perf_counter()
    while rounds < 4 or (rounds < 40 and not platform.any(time.perf_counter() - begun > budget)):
        for key, turn in turns.items():
            platform.synchronize()
            started = time.perf_counter()
            turn()
            platform.synchronize()
            taken[key].append(time.perf_counter() - started)
        rounds += 1
    median = {key: statistics.median(values[1:]) for key, values in taken.items()}  # the first round is a warm-up
    return median["", "product"], {name: (median[name, "forward"], median[name, "both"]) for name in names}


def _memory(platform: Any) -> int:
    """Reset the peak and return the bytes in use now."""
    if platform.is_cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(platform)


def _peak(platform: Any) -> int:
    """Peak bytes in use since `_memory`."""
    if platform.is_cuda:
        return platform.peak_memory()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1], help="tensor-parallel degrees")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument(
        "--trained", type=float, nargs="+", default=[1.0], help="fractions of positions that are trained"
    )
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="time budget per size; 0 measures memory only (default: 30)"
    )
    args = parser.parse_args()

    import torch

    from megatron_iwsft.testing import run_distributed

    status = 0
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one thread per process"
    print(f"{where}; torch {torch.__version__}")
    print(
        f"{'':18} {'TP':>2} {'T':>6} {'V':>7} {'H':>5} {'':4} {'trained':>7} {'forward':>9} {'of matmul':>9} {'both':>9} {'of matmul':>9} "
        f"{'memory':>8}"
    )
    for tensor, *numbers in itertools.product(
        args.tensor, args.tokens, args.vocabulary, args.hidden, args.dtype, args.trained
    ):
        size = Size(*numbers)
        names = [
            name
            for name in args.only
            if (args.device == "cuda" or not IMPLEMENTATIONS[name][1]) and (tensor == 1 or IMPLEMENTATIONS[name][2])
        ]
        # On CPU, one process per implementation: resident memory does not shrink.
        parts = [names] if args.device == "cuda" else [[name] for name in names]
        memory: dict[str, int | str] = {}
        for part in parts:
            memory |= run_distributed(peaks, tensor, size, part, device=args.device)[0]
        problems = [found for found in memory.values() if isinstance(found, str)]
        if any(
            not found.startswith(("ImportError", "ModuleNotFoundError")) for found in problems
        ):  # it is not installed
            status = 1
        ran = [name for name in names if args.seconds and not isinstance(memory[name], str)]
        product, taken = (
            run_distributed(times, tensor, size, ran, args.seconds, device=args.device)[0] if ran else (0.0, {})
        )
        for name in names:
            print(_row(tensor, size, name, product, taken.get(name), memory[name]), flush=True)
    return status


def _row(
    tensor: int, size: Size, name: str, product: float, taken: tuple[float, float] | None, memory: int | str
) -> str:
    head = f"{name:18} {tensor:>2} {size.tokens:>6} {size.vocabulary:>7} {size.hidden:>5} {size.dtype:4} {size.trained:>7.0%} "
    if isinstance(memory, str):
        return head + memory
    speed = " " * 40
    if taken is not None:
        baseline, (forward, both) = product * size.trained, taken
        speed = f"{forward * 1e3:>7.1f}ms {baseline / forward:>9.0%} {both * 1e3:>7.1f}ms {3 * baseline / both:>9.0%} "
    return head + f"{speed}{memory / 2**20:>5.0f}MiB"


if __name__ == "__main__":  # spawned processes import this file
    run_command(main)
