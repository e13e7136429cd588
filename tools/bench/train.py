"""Speed and memory of SFT and iw-SFT training: tools/bench/train.py [--model 1.5b] [--seq-length 4096 8192] [--fp8 tensorwise]

Every line of the table is a separate process (with --share-process, one process for all objectives of a precision) that runs the
trainer's steps (without saving) on the same generated, packed trajectories. `peer` is the same work in transformers, with one
trajectory per forward pass and the loss of the paper's released script: log-softmax of the full logits, then a gather, and for iw-SFT
a second model as the reference.

On a CPU: tools/bench/train.py --device cpu --hf SMALL_MODEL --dtype fp32 --seq-length 512 --batch 2 --rounds 3

Model FLOPs count matmuls only, 3 × forward: causal attention within each trajectory, the vocabulary projection of trained positions,
nothing for padding, recomputation or a reference. MFU divides them by the device's dense bf16 peak if it is known, otherwise by the
rate of a large matmul in the dtype of the run, measured here. Both are printed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.utils.cli import run_command

ROOT = Path(__file__).resolve().parents[2]

# Shapes of the Qwen2.5 models of these sizes (of 7B a quarter of the layers, which load fast and fit on any GPU), and one for a laptop.
_SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008),
    "7b-quarter": dict(hidden_size=3584, num_hidden_layers=7, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
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
    add("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
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
    if args.device == "cpu":
        os.environ["IWSFT_DEVICE"] = "cpu"
    if args.case:
        work(args, [Case(**case) for case in json.loads(args.case[0])], Path(args.case[1]))
        return
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        bench(args, Path(args.keep))
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
        if args.hf is None:
            make_weights(directory, args)
        make_corpus(directory, args, seq_length)
        found: dict[Case, Measured] = {}
        for case, result in _in_turns(args, list(_cases(args, seq_length)), directory):
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


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The model's config.json."""
    common = {"model_type": "qwen2", "vocab_size": args.vocabulary, "max_position_embeddings": 32768}
    return common | {"tie_word_embeddings": True, "architectures": ["Qwen2ForCausalLM"]} | _SHAPES[args.model]


def make_weights(directory: Path, args: argparse.Namespace) -> None:
    """Write a Hugging Face directory of random weights: read in a fraction of the time that every process would take to generate them."""
    import torch

    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit, write_directory
    from megatron_iwsft.hf.mapping import shapes

    output = directory / "weights"
    if output.exists():
        return
    arch = Architecture.from_hf(architecture(args), where="the model")
    source = RandomInit(arch, 0)

    def read(name: str) -> Any:
        return source.read(name, (0, 0, shapes(arch)[name][0]))

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    write_directory(output, arch, read, names=shapes(arch), dtype=dtype)


def make_corpus(directory: Path, args: argparse.Namespace, seq_length: int) -> None:
    """Write a corpus of random tokens: log-normal lengths up to `seq_length`, the first fifth of each is the prompt."""
    import numpy as np

    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    home = directory / str(seq_length)
    if (home / "corpus" / "manifest.json").exists():
        return
    home.mkdir(exist_ok=True)
    (home / "text.jsonl").write_text('{"text": "one and two"}\n')
    tokenizer = Path(args.hf) if args.hf else home / "tokenizer"
    if args.hf is None:
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
    return {
        "run": {"name": "bench", "dir": str(directory / f"{case.objective}-{case.fp8}-{case.seq_length}")},
        "model": {"hf": args.hf or str(directory / "weights")},
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


def work(args: argparse.Namespace, cases: list[Case], directory: Path) -> None:
    """Run cases in this process, and write measured-<number>.json of each: what was measured, or a line about what failed."""
    for number, case in enumerate(cases):
        try:
            found: Any = asdict(_measured(args, case, directory))
        except Exception as error:
            if len(cases) == 1:
                raise
            traceback.print_exc()
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        gc.collect()  # of the model, before the next one is built
        _empty_cache()
        if os.environ.get("RANK", "0") == "0":
            (directory / f"measured-{number}.json").write_text(json.dumps(found))
    if cases[0].program == "ours":
        from megatron_iwsft.distributed.context import stop

        stop()


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measured(args: argparse.Namespace, case: Case, directory: Path) -> Measured:
    """Run the steps of a case, after the reference's log-probs if it needs them."""
    from megatron_iwsft.config.loader import parse_config

    config = parse_config(json.dumps(_config(args, case, directory)), [], where="the bench's config")
    if case.program == "ours" and case.objective.endswith("cached"):
        from megatron_iwsft.train.precompute import precompute_reference

        precompute_reference(config)
    lines = list((trainer_steps if case.program == "ours" else peer_steps)(config, args.warmup + args.steps))
    measured = lines[args.warmup :]
    seconds = sum(line["step_time_s"] for line in measured)
    return Measured(
        step_s=statistics.median(line["step_time_s"] for line in measured),
        tokens_per_s=sum(line["tokens"] for line in measured) / seconds,
        flops=sum(line["tflops_per_gpu"] * line["step_time_s"] for line in measured) * 1e12 / seconds,
        memory=max(line["peak_memory_bytes"] for line in measured),
        losses=[line["loss"] for line in lines],
    )


def trainer_steps(config: Any, steps: int) -> Iterator[dict[str, Any]]:
    """Run the trainer's steps and yield their metrics."""
    from contextlib import ExitStack

    from megatron_iwsft.distributed.stop_signals import StopSignals
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.setup import start
    from megatron_iwsft.train.trainer import Trainer

    with StopSignals() as signals:
        run = start(check(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        with run.watchdog() as watch, ExitStack() as at_exit:
            trainer = Trainer(run, watch, signals, at_exit)
            for number in range(1, steps + 1):
                result = trainer.train_step(number)
                assert result is not None, "divergence detection is off"
                yield result.metrics


def _peer_models(config: Any, device: Any) -> tuple[Any, Any]:
    """The peer's model, and its reference for iw-SFT (else None), with the same weights as ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model.hf, attn_implementation="sdpa", dtype=torch.float32)
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
    from megatron_iwsft.hf.directory import SafetensorsDirectory
    from megatron_iwsft.model.flops import training_flops
    from megatron_iwsft.train.sampling import make_sampler, open_mixture

    cuda = torch.cuda.is_available() and os.environ.get("IWSFT_DEVICE") != "cpu"
    platform = Platform(torch.device("cuda" if cuda else "cpu"), rank=0, world_size=1)
    device = platform.device
    corpus = open_mixture(config)
    sampler = make_sampler(config, corpus)
    arch = SafetensorsDirectory(config.model.hf).architecture
    model, reference = _peer_models(config, device)
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
