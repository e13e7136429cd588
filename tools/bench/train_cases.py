"""What tools/bench/train.py measures: one case, in the trainer or in transformers, with its corpus and weights."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Shapes of the Qwen2.5 models of these sizes (of 7B a quarter of the layers, which load fast and fit on any GPU), and one for a laptop.
SHAPES = {
    "tiny": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=704),
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008),
    "7b-quarter": dict(hidden_size=3584, num_hidden_layers=7, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of the table. fp8: the recipe, or "none"."""

    program: str
    objective: str
    fp8: str
    seq_length: int


@dataclass(frozen=True)
class Measured:
    """Over the measured steps: median step time, tokens per second and per CPU second, model FLOPs per process and second, peak bytes;
    all losses.
    """

    step_s: float
    tokens_per_s: float
    tokens_per_cpu_s: float
    flops: float
    memory: int
    losses: list[float]


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The model's config.json."""
    common = {"model_type": "qwen2", "vocab_size": args.vocabulary, "max_position_embeddings": 32768}
    return common | {"tie_word_embeddings": True, "architectures": ["Qwen2ForCausalLM"]} | SHAPES[args.model]


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
        "adapter": {"rank": args.adapter_rank},
        "parallel": {"tensor": args.processes, "sequence": args.processes > 1, "recompute": args.recompute},
        "precision": {"dtype": args.dtype, "fp8": None if case.fp8 == "none" else case.fp8},
        "logging": {"every": 1000},
    }


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
    lines, cpu_s = [], [time.process_time()]
    for line in (trainer_steps if case.program == "ours" else peer_steps)(config, args.warmup + args.steps):
        lines.append(line)
        cpu_s.append(time.process_time())
    measured = lines[args.warmup :]
    seconds = sum(line["step_time_s"] for line in measured)
    return Measured(
        step_s=statistics.median(line["step_time_s"] for line in measured),
        tokens_per_s=sum(line["tokens"] for line in measured) / seconds,
        tokens_per_cpu_s=sum(line["tokens"] for line in measured) / (cpu_s[-1] - cpu_s[args.warmup]),
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
    ours = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ours.lr, betas=ours.betas, eps=ours.eps, weight_decay=ours.weight_decay, fused=True
    )

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
