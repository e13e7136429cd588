"""Speed and memory of SFT and iw-SFT training: tools/bench/train.py [--model 1.5b] [--seq-length 4096 8192] [--fp8 tensorwise]

On a CPU: tools/bench/train.py --device cpu --hf SMALL_MODEL --dtype fp32 --seq-length 512 --batch 2 --rounds 3

Every line of the table is a separate process that runs the trainer's steps (without saving) on the same generated, packed
trajectories; with --rounds, all lines take turns in every round, and the median round counts. `peer` is the same work in transformers,
with one trajectory per forward pass and the loss of the paper's released script: log-softmax of the full logits, then a gather, and for
iw-SFT a second model as the reference.

Model FLOPs count matmuls only, 3 × forward: causal attention within each trajectory, the vocabulary projection of trained positions,
nothing for padding, recomputation or a reference. MFU divides them by the device's dense bf16 peak if it is known, otherwise by the
rate of a large matmul in the dtype of the run, measured here. Both are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.utils.cli import run_command

ROOT = Path(__file__).resolve().parents[2]

# Shapes of the Qwen2.5 models of these sizes, and one for a laptop.
_SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008),
}  # fmt: skip

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


@dataclass(frozen=True)
class Case:
    """One line of the table. fp8: the recipe, or "none"."""

    program: str
    objective: str
    fp8: str
    seq_length: int


@dataclass(frozen=True)
class Measured:
    """Over the measured steps: median step time, tokens per second, model FLOPs per process and second, peak bytes; all losses."""

    step_s: float
    tokens_per_s: float
    flops: float
    memory: int
    losses: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(_SHAPES), default="1.5b", help="the shape, with random weights")
    add(
        "--hf",
        metavar="DIR",
        help="a Hugging Face directory in place of --model: its weights, and its tokenizer's vocabulary",
    )
    add("--device", choices=("auto", "cpu"), default="auto")
    add("--rounds", type=int, default=1, help="times that each case is run, taking turns (default: 1)")
    add("--vocabulary", type=int, default=151936)
    add("--seq-length", type=int, nargs="+", default=[4096])
    add("--batch", type=int, default=8, help="packed sequences per global batch, one per micro-batch (default: 8)")
    add("--steps", type=int, default=10, help="measured steps (default: 10)")
    add("--warmup", type=int, default=3, help="warm-up steps before them (default: 3)")
    add("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add(
        "--fp8",
        nargs="*",
        choices=FP8_RECIPES,
        default=[],
        help="FP8 recipes, in addition to bf16",
    )
    add("--recompute", choices=("none", "full"), default="none")
    add("--processes", type=int, default=1, help="tensor-parallel degree, for our trainer only (default: 1)")
    add("--no-peer", action="store_true", help="do not measure transformers")
    add("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["IWSFT_DEVICE"] = "cpu"
    if args.case:
        work(args, Case(**json.loads(args.case[0])), Path(args.case[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-train-") as directory:
        bench(args, Path(directory))


def bench(args: argparse.Namespace, directory: Path) -> None:
    """Measure every case and print the table."""
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
        + (f"{peak / 1e12:.0f} in the data sheet (the denominator of MFU)" if peak else "the denominator of MFU"),
        flush=True,
    )
    print(f"{'':10} {'':14} {'':12} {'seq':>6} {'step':>9} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'memory':>9}")
    for seq_length in args.seq_length:
        make_corpus(directory, args, seq_length)
        found: dict[Case, Measured] = {}
        for case, result in _measure_in_turns(args, list(_cases(args, seq_length)), directory):
            label = f"{case.program:10} {case.objective:14} {'FP8 ' + case.fp8 if case.fp8 != 'none' else args.dtype:14} {seq_length:>4}"
            if isinstance(result, str):
                print(f"{label} {result}", flush=True)
                continue
            found[case] = result
            print(
                f"{label} {result.step_s * 1e3:>7.0f}ms {result.tokens_per_s:>9,.0f} {result.flops / 1e12:>8.2f} "
                f"{result.flops / (peak or rate):>6.1%} {result.memory / 2**30:>6.2f}GiB",
                flush=True,
            )
        _compare(found, args.processes)


def _cases(args: argparse.Namespace, seq_length: int) -> Iterator[Case]:
    for fp8 in ["none", *args.fp8]:
        for objective in args.objective:
            if (objective, fp8) != ("iw_sft cached", "delayed"):  # refused: its scales follow the training steps
                yield Case("ours", objective, fp8, seq_length)
    if not args.no_peer:
        # The peer has no cached reference.
        for objective in dict.fromkeys(objective.replace("cached", "live") for objective in args.objective):
            yield Case("peer", objective, "none", seq_length)


def _compare(found: dict[Case, Measured], processes: int) -> None:
    """Print ratios between the cases of one sequence length."""
    for case, result in found.items():
        sft, bf16 = found.get(replace(case, objective="sft")), found.get(replace(case, fp8="none"))
        if case.objective != "sft" and sft:
            print(
                f"  {case.program}, {case.objective} / sft, {case.fp8}: {result.step_s / sft.step_s:.3f} × the step time"
            )
        if case.fp8 != "none" and bf16:
            apart = [abs(a - b) / abs(b) for a, b in zip(result.losses, bf16.losses, strict=True)]
            print(
                f"  {case.objective}, FP8 {case.fp8} / bf16: {result.tokens_per_s / bf16.tokens_per_s:.2f} × the tokens/s; "
                f"losses differ by at most {max(apart):.2%} over {len(apart)} steps, {statistics.mean(apart):.2%} on average"
            )
        peer = found.get(replace(case, program="peer", objective=case.objective.replace("cached", "live")))
        if case.program == "ours" and case.fp8 == "none" and peer and processes == 1:
            print(f"  {case.objective}, ours / peer: {result.tokens_per_s / peer.tokens_per_s:.2f} × the tokens/s")


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


def make_corpus(directory: Path, args: argparse.Namespace, seq_length: int) -> None:
    """Write a corpus of random tokens: log-normal lengths up to `seq_length`, the first fifth of each is the prompt."""
    import numpy as np

    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    home = directory / str(seq_length)
    home.mkdir()
    (home / "text.jsonl").write_text('{"text": "one and two"}\n')
    tokenizer = Path(args.hf) if args.hf else home / "tokenizer"
    if not args.hf:
        train_tokenizer([home / "text.jsonl"], tokenizer, fields=["text"], vocab_size=300)
    rng = np.random.default_rng(0)
    wanted = (args.warmup + args.steps + 1) * args.batch * seq_length
    with open(home / "tokens.jsonl", "w") as file:
        while wanted > 0:
            n = int(np.clip(rng.lognormal(np.log(seq_length / 4), 0.7), 32, seq_length))
            mask = [0] * (n // 5) + [1] * (n - n // 5)
            file.write(json.dumps({"input_ids": rng.integers(0, 200, n).tolist(), "loss_mask": mask}) + "\n")
            wanted -= n
    settings = ShardSettings(str(tokenizer), record=RecordFormat())
    shard_corpus([home / "tokens.jsonl"], home / "corpus", settings, show_progress=False)


def _config(args: argparse.Namespace, case: Case, directory: Path) -> dict[str, Any]:
    objective, _, source = case.objective.partition(" ")
    model = {
        "model_type": "qwen2",
        "vocab_size": args.vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    return {
        "run": {"name": "bench", "dir": str(directory / f"{case.objective}-{case.fp8}-{case.seq_length}")},
        "model": {"hf": args.hf} if args.hf else {"config": model | _SHAPES[args.model]},
        "data": {
            "corpus": str(directory / str(case.seq_length) / "corpus"),
            "seq_length": case.seq_length,
            "global_batch_size": args.batch,
            "max_steps": args.warmup + args.steps,
        },
        "objective": {"name": objective},
        "reference": {"source": source or "cached"},
        "parallel": {"tensor": args.processes, "sequence": args.processes > 1, "recompute": args.recompute},
        "precision": {"dtype": args.dtype, "fp8": None if case.fp8 == "none" else case.fp8},
        "logging": {"every": 1000},
    }


def _measure_in_turns(
    args: argparse.Namespace, cases: list[Case], directory: Path
) -> Iterator[tuple[Case, Measured | str]]:
    """Every case with its result over all rounds: the median round's, by tokens per second. A case that failed is not run again."""
    results: dict[Case, list[Measured]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    for _ in range(args.rounds):
        for case in cases:
            result = failed.get(case) or _measure(args, case, directory)
            if isinstance(result, str):
                failed[case] = result
            else:
                results[case].append(result)
    for case, rounds in results.items():
        rounds.sort(key=lambda measured: measured.tokens_per_s)
        yield case, failed.get(case) or rounds[len(rounds) // 2]


def _measure(args: argparse.Namespace, case: Case, directory: Path) -> Measured | str:
    """Run a case in subprocesses: precompute the reference if needed, then the steps. Returns one line of text on failure."""
    config = directory / "config.json"
    config.write_text(json.dumps(_config(args, case, directory)))
    many = ["-m", "megatron_iwsft.distributed.torchrun", "--nproc_per_node", str(args.processes)]
    launch = [sys.executable, *(many if args.processes > 1 and case.program == "ours" else [])]
    commands = [[*launch, __file__, *sys.argv[1:], "--case", json.dumps(asdict(case)), str(directory)]]
    if case.program == "ours" and case.objective.endswith("cached"):
        commands.insert(0, [*launch, str(ROOT / "tools" / "precompute_reference.py"), "--config", str(config)])
    for command in commands:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
            return "failed: " + (lines[-1][:160] if lines else f"status {done.returncode}")
    return Measured(**json.loads((directory / "measured.json").read_text()))


def work(args: argparse.Namespace, case: Case, directory: Path) -> None:
    """Run the steps of a case in this process."""
    from megatron_iwsft.config.loader import load_config

    config = load_config(str(directory / "config.json"), [])
    lines = list((trainer_steps if case.program == "ours" else peer_steps)(config, args.warmup + args.steps))
    measured = lines[args.warmup :]
    seconds = sum(line["step_time_s"] for line in measured)
    if os.environ.get("RANK", "0") != "0":
        return
    result = Measured(
        step_s=statistics.median(line["step_time_s"] for line in measured),
        tokens_per_s=sum(line["tokens"] for line in measured) / seconds,
        flops=sum(line["tflops_per_gpu"] * line["step_time_s"] for line in measured) * 1e12 / seconds,
        memory=max(line["peak_memory_bytes"] for line in measured),
        losses=[line["loss"] for line in lines],
    )
    (directory / "measured.json").write_text(json.dumps(asdict(result)))


def trainer_steps(config: Any, steps: int) -> Iterator[dict[str, Any]]:
    """Run the trainer's steps and yield their metrics."""
    from contextlib import ExitStack

    from megatron_iwsft.distributed.context import stop
    from megatron_iwsft.distributed.stop_signals import StopSignals
    from megatron_iwsft.train.setup import check, start
    from megatron_iwsft.train.trainer import Trainer

    with StopSignals() as signals:
        run = start(check(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        with run.watchdog() as watch, ExitStack() as at_exit:
            trainer = Trainer(run, watch, signals, at_exit)
            for number in range(1, steps + 1):
                result = trainer.train_step(number)
                assert result is not None, "divergence detection is off"
                yield result.metrics
    stop()


def _peer_models(config: Any, arch: Any, device: Any) -> tuple[Any, Any]:
    """The peer's model, and its reference for iw-SFT (else None), with the same random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if config.model.hf is not None:
        model = AutoModelForCausalLM.from_pretrained(config.model.hf, attn_implementation="sdpa", dtype=torch.float32)
    else:
        fields = {k: v for k, v in arch.hf.items() if k not in ("model_type", "architectures")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **fields), attn_implementation="sdpa")
    reference = None
    if config.objective.name == "iw_sft":
        reference = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
        reference.load_state_dict(model.state_dict())
        reference.to(device, torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32).eval()
    model.to(device).train()
    if config.parallel.recompute == "full":
        model.gradient_checkpointing_enable()
    return model, reference


def peer_steps(config: Any, steps: int) -> Iterator[dict[str, Any]]:
    """Train on the same batches in transformers: float32 parameters, autocast, one trajectory per forward pass, fused AdamW."""
    import torch

    from megatron_iwsft.distributed.context import Platform
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.model.flops import training_flops
    from megatron_iwsft.train.setup import make_sampler, open_mixture

    cuda = torch.cuda.is_available() and os.environ.get("IWSFT_DEVICE") != "cpu"
    platform = Platform(torch.device("cuda" if cuda else "cpu"), rank=0, world_size=1)
    device = platform.device
    corpus = open_mixture(config)
    sampler = make_sampler(config, corpus)
    hf = config.model.hf
    arch = Architecture.from_directory(hf) if hf else Architecture.from_hf(config.model.config, where="the model")
    model, reference = _peer_models(config, arch, device)
    half = config.precision.dtype == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)

    def logprobs(of: Any, ids: Any) -> Any:
        logits = of(ids[None], use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]

    for step in range(steps):
        platform.synchronize()
        begin = time.perf_counter()
        items = [int(i) for pack in sampler.packs_at(step) for i in pack]
        masks = [torch.from_numpy(corpus.mask(i)[1:].copy()).to(device) == 1 for i in items]
        trained = int(sum(mask.sum() for mask in masks))
        total = 0.0
        for i, mask in zip(items, masks, strict=True):
            ids = torch.from_numpy(corpus.tokens(i).astype("int64")).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                policy = logprobs(model, ids)
                weight = 1.0
                if reference is not None:
                    with torch.no_grad():
                        weight = ((policy - logprobs(reference, ids))[mask]).mean().exp().clamp(0, 16)
            loss = -(weight * policy[mask]).sum() / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        platform.synchronize()
        lengths = corpus.lengths[items]
        seconds = time.perf_counter() - begin
        yield {
            "step_time_s": seconds,
            "tokens": int(lengths.sum()),
            "tflops_per_gpu": training_flops(arch, lengths, trained) / seconds / 1e12,
            "peak_memory_bytes": platform.peak_memory(),
            "loss": total,
        }


if __name__ == "__main__":
    run_command(main)
