"""Speed and memory of SFT and iw-SFT training: tools/bench/train.py [--model 1.5b] [--seq-length 4096 8192] [--fp8 tensorwise]

Every line of the table is a separate process (with --share-process, one process for all objectives of a precision) that runs the
trainer's steps (without saving) on the same generated, packed trajectories. `peer` is the same work in transformers, with one
trajectory per forward pass and the loss of the paper's released script: log-softmax of the full logits, then a gather, and for iw-SFT
a second model as the reference.

With --adapter-rank, low-rank adapters are trained instead of the weights, and `iw_sft base` has the frozen weights as its reference.

On a CPU: tools/bench/train.py --device cpu --hf SMALL_MODEL --dtype fp32 --seq-length 512 --batch 2 --rounds 3

Model FLOPs count matmuls only, 3 × forward: causal attention within each trajectory, the vocabulary projection of trained positions,
nothing for padding, recomputation or a reference. MFU divides them by the device's dense bf16 peak if it is known, otherwise by the
rate of a large matmul in the dtype of the run, measured here. Both are printed.

On a machine that other programs share, compare tokens per second of CPU time (of all threads).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from train_cases import SHAPES, Case, Measured, make_corpus, make_weights, work

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.utils.cli import run_command

ROOT = Path(__file__).resolve().parents[2]

# Dense bf16 FLOP/s from the data sheets (SXM modules).
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
}

OBJECTIVES = ("sft", "iw_sft cached", "iw_sft live")
ON_ADAPTERS = ("sft", "iw_sft cached", "iw_sft base", "iw_sft live")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="1.5b", help="the shape, with random weights")
    add("--hf", metavar="DIR", help="a Hugging Face directory in place of --model: its weights and its tokenizer")
    add("--device", choices=("auto", "cpu"), default="auto")
    add(
        "--rounds",
        type=int,
        default=1,
        help="times that each case is run, taking turns; the median round counts (default: 1)",
    )
    add("--vocabulary", type=int, default=151936)
    add("--seq-length", type=int, nargs="+", default=[4096])
    add("--batch", type=int, default=8, help="packed sequences per global batch, one per micro-batch (default: 8)")
    add("--steps", type=int, default=10, help="measured steps (default: 10)")
    add("--warmup", type=int, default=3, help="warm-up steps before them (default: 3)")
    add("--objective", nargs="+", choices=ON_ADAPTERS, help="default: all")
    add(
        "--adapter-rank",
        type=int,
        default=0,
        metavar="N",
        help="train adapters of this rank, without the peer (default: all weights)",
    )
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add(
        "--fp8",
        nargs="*",
        choices=FP8_RECIPES,
        default=[],
        help="FP8 recipes, in addition to bf16",
    )
    add("--only-fp8", action="store_true", help="only the FP8 recipes, not bf16")
    add("--recompute", choices=("none", "full"), default="none")
    add("--processes", type=int, default=1, help="tensor-parallel degree, for our trainer only (default: 1)")
    add("--no-peer", action="store_true", help="do not measure transformers")
    add("--share-process", action="store_true", help="one process for all objectives of a precision: faster to start")
    add(
        "--keep", metavar="DIR", help="keep corpus and weights in this directory, for further calls with the same sizes"
    )
    add("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.objective = args.objective or list(ON_ADAPTERS if args.adapter_rank else OBJECTIVES)
    if "iw_sft base" in args.objective and not args.adapter_rank:
        parser.error("iw_sft base needs --adapter-rank")
    args.no_peer |= args.adapter_rank > 0
    if args.device == "cpu":
        os.environ["IWSFT_DEVICE"] = "cpu"
    if args.case:
        work(args, [Case(**case) for case in json.loads(args.case[0])], Path(args.case[1]))
        return 0
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        return bench(args, Path(args.keep))
    with tempfile.TemporaryDirectory(prefix="bench-train-") as directory:
        return bench(args, Path(directory))


def bench(args: argparse.Namespace, directory: Path) -> int:
    """Measure every case and print the table. Exit status: 1 if a case failed."""
    status = 0
    import torch

    cuda = torch.cuda.is_available() and os.environ.get("IWSFT_DEVICE") != "cpu"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads per process"
    rate = _product_rate(cuda, args.dtype)
    known = cuda and args.dtype == "bf16" and "MIG" not in device
    peak = next((peak for name, peak in _PEAKS.items() if known and re.search(rf"\b{name}\b", device)), None)
    print(f"{device}; torch {torch.__version__}; {_versions()}")
    print(
        f"{args.hf or args.model}, {args.batch} sequences per step, {args.processes} process(es), recompute {args.recompute}, "
        f"{args.dtype}; large matmul in {args.dtype}: {rate / 1e12:.2f} TFLOP/s measured, "
        + (f"{peak / 1e12:.0f} in the data sheet (the denominator of MFU)" if peak else "the denominator of MFU")
        + (f"; adapters of rank {args.adapter_rank}" if args.adapter_rank else ""),
        flush=True,
    )
    print(f"{'':10} {'':14} {'':12} {'seq':>6} {'step':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'memory':>9}")
    for seq_length in args.seq_length:
        if args.hf is None:
            make_weights(directory, args)
        make_corpus(directory, args, seq_length)
        found: dict[Case, Measured] = {}
        for case, result in _in_turns(args, list(_cases(args, seq_length)), directory):
            label = f"{case.program:10} {case.objective:14} {'FP8 ' + case.fp8 if case.fp8 != 'none' else args.dtype:14} {seq_length:>4}"
            if isinstance(result, str):
                print(f"{label} {result}", flush=True)
                status = 1
                continue
            found[case] = result
            print(
                f"{label} {result.step_s * 1e3:>7.0f}ms {result.tokens_per_s:>9,.0f} {result.flops / 1e12:>8.2f} "
                f"{result.flops / (peak or rate):>6.1%} {result.memory / 2**30:>6.2f}GiB",
                flush=True,
            )
        _compare(found, args.processes)
    return status


def _cases(args: argparse.Namespace, seq_length: int) -> Iterator[Case]:
    for fp8 in [*(() if args.only_fp8 else ("none",)), *args.fp8]:
        for objective in args.objective:
            if (objective, fp8) != ("iw_sft cached", "delayed"):  # refused: its scales follow the training steps
                yield Case("ours", objective, fp8, seq_length)
    if not args.no_peer:
        # The peer has no cached reference.
        for objective in dict.fromkeys(objective.replace("cached", "live") for objective in args.objective):
            yield Case("peer", objective, "none", seq_length)


def _in_turns(args: argparse.Namespace, cases: list[Case], directory: Path) -> Iterator[tuple[Case, Measured | str]]:
    """Every case with its median round, by tokens per second, or with its failure."""
    found: dict[Case, list[Measured]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    for _ in range(args.rounds):
        for case, result in _results(args, [case for case in cases if case not in failed], directory):
            if isinstance(result, str):
                failed[case] = result
            else:
                found[case].append(result)
            if args.rounds == 1:
                yield case, result
    for case, rounds in found.items() if args.rounds > 1 else ():
        rounds.sort(key=lambda measured: measured.tokens_per_s)
        yield case, failed.get(case) or rounds[len(rounds) // 2]


def _results(args: argparse.Namespace, cases: list[Case], directory: Path) -> Iterator[tuple[Case, Measured | str]]:
    """Run the cases, each in a process of its own or with others of its precision."""
    together = (
        args.share_process and args.processes == 1
    )  # of several ranks, one that fails would leave the others waiting
    for _, group in itertools.groupby(cases, lambda case: (case.program, case.fp8) if together else case):
        yield from _measure(args, list(group), directory)


def _compare(found: dict[Case, Measured], processes: int) -> None:
    """Print ratios between the cases of one sequence length."""
    for case, result in found.items():
        sft, bf16 = found.get(replace(case, objective="sft")), found.get(replace(case, fp8="none"))
        if case.objective != "sft" and sft:
            print(
                f"  {case.program}, {case.objective} / sft, {case.fp8}: {result.step_s / sft.step_s:.3f} × the step time, "
                f"{sft.tokens_per_cpu_s / result.tokens_per_cpu_s:.3f} × the CPU time per token"
            )
        if case.fp8 != "none" and bf16:
            apart = [abs(a - b) / abs(b) for a, b in zip(result.losses, bf16.losses, strict=True)]
            print(
                f"  {case.objective}, FP8 {case.fp8} / bf16: {result.tokens_per_s / bf16.tokens_per_s:.2f} × the tokens/s; "
                f"losses differ by at most {max(apart):.2%} over {len(apart)} steps, {statistics.mean(apart):.2%} on average"
            )
        peer = found.get(replace(case, program="peer", objective=case.objective.replace("cached", "live")))
        if case.program == "ours" and case.fp8 == "none" and peer and processes == 1:
            print(
                f"  {case.objective}, ours / peer: {result.tokens_per_s / peer.tokens_per_s:.2f} × the tokens/s, "
                f"{result.tokens_per_cpu_s / peer.tokens_per_cpu_s:.2f} × the tokens per second of CPU time"
            )


def _product_rate(cuda: bool, dtype: str) -> float:
    """FLOP/s of a large matmul, the best of 12."""
    import torch

    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    times = []
    for _ in range(12):
        _wait(cuda)
        begin = time.perf_counter()
        torch.mm(a, a)
        _wait(cuda)
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def _wait(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    out = []
    for package in ("megatron-core", "transformer-engine", "transformers", "triton"):
        try:
            out.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            out.append(f"no {package}")
    return ", ".join(out)


def _measure(args: argparse.Namespace, cases: list[Case], directory: Path) -> Iterator[tuple[Case, Measured | str]]:
    """Run cases in a process (or with --processes, a job). A failed one gives a line of text, and its traceback on standard error."""
    for path in directory.glob("measured-*.json"):
        path.unlink()
    many = ["-m", "megatron_iwsft.distributed.torchrun", "--nproc_per_node", str(args.processes)]
    launch = [sys.executable, *(many if args.processes > 1 and cases[0].program == "ours" else [])]
    command = [*launch, __file__, *sys.argv[1:], "--case", json.dumps([asdict(case) for case in cases]), str(directory)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    failed = False
    for number, case in enumerate(cases):
        file = directory / f"measured-{number}.json"
        found = json.loads(file.read_text()) if file.exists() else (lines[-1] if lines else f"status {done.returncode}")
        failed |= isinstance(found, str)
        yield case, f"failed: {found[:160]}" if isinstance(found, str) else Measured(**found)
    if failed:
        print("\n".join(lines[-150:]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
