"""For tests and benchmarks: jobs of CPU processes, a small corpus, unsharded gradients, metrics that can be compared."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.distributed.context import DeviceChoice, ParallelContext
from megatron_iwsft.distributed.mcore_compat import quiet_megatron
from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.errors import UserError
from megatron_iwsft.objectives.metrics import TIMING
from megatron_iwsft.utils.jsonl import read_json_lines

# What the server that CPU processes are forked from imports once: it takes seconds, a fork milliseconds.
_PRELOADED = ["megatron_iwsft.train.trainer", "megatron_iwsft.train.precompute", "transformers"]


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, device: DeviceChoice = "cpu"
) -> list[Any]:
    """`run_job` from a process server on CPU. Every failure is an AssertionError with the traceback of the rank that failed first."""
    quiet_megatron()
    multiprocessing.set_forkserver_preload(_PRELOADED)
    start_method: Literal["spawn", "forkserver"] = "spawn" if device == "cuda" else "forkserver"
    try:
        return run_job(function, world_size, *args, device=device, start_method=start_method, timeout_s=120, threads=1)
    except (RuntimeError, UserError) as error:
        raise AssertionError(str(error)) from None


def comparable_metrics(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl, without metrics that measure time or memory."""
    path = run / "metrics.jsonl"
    lines = read_json_lines(path)[0] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def worked_sums(directory: Path, count: int) -> Path:
    """A corpus of generated sums with scores, under `directory`, and a tokenizer of at most 400 tokens; returns the corpus."""
    from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
    from megatron_iwsft.data.prepare.records import RecordFormat
    from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
    from megatron_iwsft.data.prepare.train_tokenizer import train_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    records = directory / "records.jsonl"
    lines = (json.dumps(r) for r in arithmetic_records(count, ArithmeticSettings(), seed=1))
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer([records], tokenizer, fields=["prompt", "response"], vocab_size=400)
    settings = ShardSettings(str(tokenizer), record=RecordFormat(score_fields=("score",)))
    shard_corpus([records], directory / "corpus", settings, show_progress=False)
    return directory / "corpus"


def whole_gradients(chunks: list[Any], parallel: ParallelContext) -> dict[str, Tensor]:
    """The gradient of every trained parameter in Hugging Face's names and shapes (adapters: PEFT's) on the first rank; {} on others.

    Reads `main_grad` after reduction, so the data-parallel sharding of a distributed optimizer must be off. Collective.
    """
    from megatron_iwsft.hf.adapter_mapping import adapter_rows
    from megatron_iwsft.hf.mapping import PerExpert, named_rows
    from megatron_iwsft.model.gpt import PolicyModel
    from megatron_iwsft.model.parameters import checkpoint_name

    local: dict[tuple[str, int | None], Tensor] = {}
    architecture = adapters = None
    for chunk in chunks:
        model: PolicyModel = chunk.module
        parameter: Any
        architecture, adapters = model.architecture, model.adapters
        for name, parameter in model.trained_parameters():
            local[checkpoint_name(model, name)] = parameter.main_grad.detach().cpu().clone()
    assert architecture is not None
    gathered: list[Any] = [None] * (dist.get_world_size() if dist.get_rank() == 0 else 0)
    dist.gather_object((parallel.tp.rank(), local), gathered or None)
    if not gathered:
        return {}
    shards: dict[tuple[str, int | None], dict[int, Tensor]] = {}
    for rank, part in gathered:
        for (name, expert), tensor in part.items():
            piece = rank if expert is None else 0  # tensor parallelism does not cut experts
            known = shards.setdefault((name, expert), {}).setdefault(piece, tensor)
            if known is not tensor and not torch.equal(known, tensor):
                raise AssertionError(
                    f"ranks that hold the same shard of {name} differ: norms {known.norm():g} and {tensor.norm():g}"
                )
    out: dict[str, Tensor] = {}
    rows = named_rows(architecture, tensor_parallel=parallel.tp.size())
    for name, row in rows if adapters is None else adapter_rows(architecture, adapters.settings):
        if isinstance(row.layout, PerExpert):
            full = torch.stack([shards[name, expert][0] for expert in range(row.layout.count)])
        else:
            full = row.layout.unshard([shards[name, None][rank] for rank in range(parallel.tp.size())])
        out |= dict(zip(row.hf, row.layout.split(full), strict=True))
    return out
