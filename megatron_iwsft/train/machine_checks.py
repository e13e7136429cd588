"""Short checks that what a run is made of works on this machine, each with its time: `iwsft doctor --gpu`.

The checks run in a process of their own, one after another. One that raises fails alone; one that ends the process or hangs costs a
restart with the next.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.distributed.capabilities import broken_transformer_engine, fp8_refusal, transformer_engine
from megatron_iwsft.distributed.context import Platform, start, stop
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe
from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.ops import logits as rows

LIMIT_S = 120.0  # of one check
_START_S = 300.0  # of the worker: imports
_READY = "ready\n"  # the worker's first line


@dataclass(frozen=True)
class CheckOutcome:
    """What became of a check. detail: what it found, why it was skipped, or the traceback."""

    name: str
    status: Literal["ok", "skipped", "failed"]
    seconds: float
    detail: str


class NotHereError(Exception):
    """This machine lacks what a check is about; the message says what."""


def run_checks(
    table: str = "megatron_iwsft.train.machine_checks:CHECKS", *, limit_s: float = LIMIT_S
) -> Iterator[CheckOutcome]:
    """Run every check of a table (module:name of a dict) and yield the outcomes as they come. limit_s: seconds that each may take."""
    remaining = list(_checks(table))
    with tempfile.TemporaryDirectory() as directory:
        while remaining:
            file, errors = Path(directory) / "outcomes", Path(directory) / "errors"
            file.write_text("")
            with open(errors, "w") as sink:
                begin = time.monotonic()
                call = "import sys; from megatron_iwsft.train.machine_checks import work; work(*sys.argv[1:])"
                command = [sys.executable, "-c", call, table, str(file), *remaining]
                worker = subprocess.Popen(command, stdout=sink, stderr=sink)
                for outcome in _arriving(worker, file, limit_s):
                    remaining.remove(outcome.name)
                    yield outcome
                    begin = time.monotonic()
                ended = f"the process ended with status {worker.poll()}"
                if worker.poll() is None:
                    worker.kill()
                    ended = f"it took more than {limit_s:g} s"
                worker.wait()
            seconds = time.monotonic() - begin
            if remaining:
                text = errors.read_text(errors="replace").strip()
                yield CheckOutcome(remaining.pop(0), "failed", seconds, f"{ended}\n{text}"[-8000:])


def _arriving(worker: subprocess.Popen, file: Path, limit_s: float) -> Iterator[CheckOutcome]:
    """Outcomes as the worker writes them, until it ends or has written none for limit_s since it was ready."""
    seen, deadline = 0, time.monotonic() + _START_S
    while True:
        running = worker.poll() is None  # asked first: what it wrote before it ended is read below
        lines = file.read_text().splitlines(keepends=True)
        complete = [line for line in lines[seen:] if line.endswith("\n")]
        for line in complete:
            if line == _READY:
                continue
            yield CheckOutcome(**json.loads(line))
        if complete:
            seen, deadline = seen + len(complete), time.monotonic() + limit_s
        if not running or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _checks(table: str) -> dict[str, Callable[[Platform], str]]:
    module, _, name = table.partition(":")
    return getattr(importlib.import_module(module), name)


def work(table: str, file: str, *names: str) -> None:
    """Run these checks of a table in this process and append their outcomes to a file, as JSON lines."""
    broken = broken_transformer_engine()
    if broken:  # its own checks fail; the others run as if it were not installed
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    platform, checks = start(), _checks(table)
    Path(file).write_text(_READY)
    for name in names:
        begin = time.perf_counter()
        status: Literal["ok", "skipped", "failed"] = "ok"
        try:
            if broken and name in WITH_TRANSFORMER_ENGINE:
                raise RuntimeError(f"Transformer Engine {broken}")
            detail = checks[name](platform)
            platform.synchronize()  # an error of a kernel is reported here
        except NotHereError as error:
            status, detail = "skipped", str(error)
        except Exception:
            status, detail = "failed", traceback.format_exc()
        with open(file, "a") as out:
            out.write(json.dumps(asdict(CheckOutcome(name, status, time.perf_counter() - begin, detail))) + "\n")
        if status == "failed":
            platform.synchronize()  # raises, and so restarts the process, if the GPU's state is lost
    stop()


def _milliseconds(platform: Platform, function: Callable[[], Any]) -> str:
    """Time of the second of two calls."""
    function()
    platform.synchronize()
    begin = time.perf_counter()
    function()
    platform.synchronize()
    return f"{(time.perf_counter() - begin) * 1e3:.2f} ms"


def _close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> str:
    """Relative error, in norm; AssertionError if it is above the tolerance."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error <= tolerance, f"{what} is off by {error:.1e}, more than {tolerance:.0e}"
    return f"error {error:.0e}"


def _size(platform: Platform) -> int:
    return 4096 if platform.is_cuda else 256


def _matmul_bf16(platform: Platform) -> str:
    n = _size(platform)
    a, b = (torch.randn(n, n, device=platform.device, dtype=torch.bfloat16) for _ in range(2))
    error = _close("the product", a[:16] @ b, a[:16].double() @ b.double(), 1e-2)
    return f"{n}³: {_milliseconds(platform, lambda: a @ b)}, {error}"


def _matmul_fp8(recipe: FP8Recipe) -> Callable[[Platform], str]:
    def check(platform: Platform) -> str:
        refusal = fp8_refusal(recipe, on_cpu=not platform.is_cuda)
        if refusal:
            raise NotHereError(refusal)
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes

        made = {
            "delayed": "DelayedScaling",
            "tensorwise": "Float8CurrentScaling",
            "blockwise": "Float8BlockScaling",
            "mxfp8": "MXFP8BlockScaling",
        }
        scaling, n = getattr(recipes, made[recipe])(), _size(platform)
        layer = te.Linear(n, n, bias=False, params_dtype=torch.bfloat16, device=platform.device)
        x = torch.randn(n, n, device=platform.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)

        def both() -> Tensor:
            x.grad = None
            with te.fp8_autocast(enabled=True, fp8_recipe=scaling):
                out = layer(x)
            out.backward(grad)
            return out.detach()

        both()  # delayed scaling has no scales before the first pass
        out, weight = both(), layer.weight.detach()
        assert x.grad is not None
        errors = _close("the output", out, x.detach() @ weight.t(), 0.1), _close("d input", x.grad, grad @ weight, 0.1)
        return f"{n}³ forward and backward: {_milliseconds(platform, both)}, {errors[0]}, of d input {errors[1]}"

    return check


def _triton(kernel: Literal["statistics", "entropy", "gradient"]) -> Callable[[Platform], str]:
    def check(platform: Platform) -> str:
        if not platform.is_cuda:
            raise NotHereError("no GPU")
        refusal = rows.triton_refusal(platform.device)
        if refusal:
            raise RuntimeError(refusal)
        n, vocabulary = 512, 50257
        logits = rows.logits_buffer(torch.zeros(0, dtype=torch.bfloat16, device=platform.device), n, vocabulary)
        logits.normal_()
        target, grad = torch.arange(n, device=platform.device), torch.ones(n, device=platform.device)
        exact = logits.double()
        lse = exact.logsumexp(1).float()
        if kernel == "gradient":
            expected = torch.nn.functional.one_hot(target, vocabulary) - exact.softmax(1)
            copy = logits.clone()
            rows.logits_gradient(copy, target, lse, grad)
            error = _close("the gradient", copy, expected, 1e-2)
            return f"{_milliseconds(platform, lambda: rows.logits_gradient(copy, target, lse, grad))}, {error}"
        out = torch.empty(4 if kernel == "entropy" else 3, n, device=platform.device)
        rows.row_statistics(logits, target, out=out)
        error = _close("log-sum-exp", out[0] + out[1].log(), exact.logsumexp(1), 1e-5)
        if kernel == "entropy":
            shifted = exact - exact.amax(1, keepdim=True)
            error = _close("the entropy's sum", out[3], (shifted.exp() * shifted).sum(1), 1e-5)
        return f"{_milliseconds(platform, lambda: rows.row_statistics(logits, target, out=out))}, {error}"

    return check


def _attention(backend: Literal["local", "transformer_engine"]) -> Callable[[Platform], str]:
    """Attention over a packed row of segments, forward and backward, against each segment on its own in float32."""

    def check(platform: Platform) -> str:
        if backend == "transformer_engine":
            _need_transformer_engine(platform)
        lengths, heads, size = (96, 160, 256), 8, 64
        boundaries = torch.tensor((0, *lengths)).cumsum(0).to(platform.device, torch.int32)
        q, k, v = torch.randn(3, sum(lengths), heads, size, device=platform.device, dtype=torch.bfloat16).unbind()
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        module, arguments = _attention_module(backend, platform, heads, size, boundaries, max(lengths))

        def both() -> Tensor:
            for x in inputs:
                x.grad = None
            out = module(*inputs, **arguments)
            out.float().square().sum().backward()
            return out.detach()

        plain = [x.float().requires_grad_() for x in (q, k, v)]
        expected = torch.cat([_causal(*piece) for piece in zip(*(x.split(lengths) for x in plain), strict=True)])
        expected.square().sum().backward()
        errors = _close("the output", both().flatten(1), expected, 2e-2)
        for found, wanted in zip(inputs, plain, strict=True):
            assert found.grad is not None and wanted.grad is not None
            _close("a gradient", found.grad, wanted.grad, 5e-2)
        return f"forward and backward: {_milliseconds(platform, both)}, {errors}"

    return check


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one segment, each [tokens, heads, size] → [tokens, heads · size]."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


def _attention_module(
    backend: str, platform: Platform, heads: int, size: int, boundaries: Tensor, longest: int
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    if backend == "transformer_engine":
        import transformer_engine.pytorch as te

        module = te.DotProductAttention(heads, size, attn_mask_type="padding_causal", qkv_format="thd")
        lengths = dict(cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)
        return module, lengths
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_iwsft.model.moe import PackedRow
    from megatron_iwsft.model.packed_attention import PackedAttention

    config = TransformerConfig(num_layers=1, hidden_size=heads * size, num_attention_heads=heads)
    local = PackedAttention(config, 1, pg_collection=SimpleNamespace(cp=platform.parallel().cp))
    row = PackedRow(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return local, dict(packed_seq_params=row)


def _need_transformer_engine(platform: Platform) -> None:
    engine, why = transformer_engine()
    if not platform.is_cuda or engine is None:
        raise NotHereError("no GPU" if not platform.is_cuda else f"Transformer Engine is {why}")


def _collectives(platform: Platform) -> str:
    """A job of one process per GPU, on CPU of two: one all-reduce per process group of a layout that uses as many as it can."""
    ranks = torch.cuda.device_count() if platform.is_cuda else 2
    found = run_job(_all_reduces, ranks, device="cuda" if platform.is_cuda else "cpu", timeout_s=60, threads=1)[0]
    return f"{ranks} processes; " + ", ".join(found)


def _all_reduces(platform: Platform) -> list[str]:
    degrees: dict[str, Any] = {}
    left = platform.world_size
    for name in ("tensor", "pipeline", "context"):
        degrees[name] = 2 if left % 2 == 0 else 1
        left //= degrees[name]
    parallel = platform.parallel(**degrees)
    out = []
    for name in ("tp", "pp", "cp", "dp", "dp_cp", "ep"):
        group: dist.ProcessGroup = getattr(parallel, name)
        value = torch.ones(1 << 20 if platform.is_cuda else 1, device=platform.device)
        dist.all_reduce(value, group=group)
        assert float(value[-1]) == group.size(), (
            f"the all-reduce over {name} gave {float(value[-1])}, not {group.size()}"
        )
        took = _milliseconds(platform, partial(dist.all_reduce, value, group=group))
        out.append(f"{name} ({group.size()}) {took}")
    return out


_TINY = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}


def _training_step(backend: Literal["local", "transformer_engine"]) -> Callable[[Platform], str]:
    """A few iw-SFT steps of a tiny model on one batch: the nll must fall. The loss need not: the weights grow."""

    def check(platform: Platform) -> str:
        if backend == "transformer_engine":
            _need_transformer_engine(platform)
        from megatron_iwsft.config.schema import Optimizer
        from megatron_iwsft.hf.architecture import Architecture
        from megatron_iwsft.hf.directory import RandomInit
        from megatron_iwsft.model.gpt import ModelSettings, build_model
        from megatron_iwsft.model.parameters import load_weights
        from megatron_iwsft.objectives.functions import Settings, iw_sft
        from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
        from megatron_iwsft.train.step import TrainStep

        parallel, arch = platform.parallel(), Architecture.from_hf(_TINY, where="the doctor's model")
        settings = Optimizer(lr=1e-3, distributed=False)
        chunks = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, backend=backend))
        load_weights(chunks, RandomInit(arch, 1), parallel)
        wrapped = wrap_for_gradients(chunks, settings)
        optimizer = build_optimizer(wrapped, settings, torch.bfloat16)
        step = TrainStep(wrapped, parallel, platform.device, iw_sft, Settings("sequence", 1.0, (0.0, 16.0), "tokens"))
        batch, losses = _batch(platform.device, arch.vocab_size), []

        def both() -> None:
            losses.append(step.forward_backward([batch])["nll"])
            optimizer.step()

        both()
        took = _milliseconds(platform, both)
        assert losses[-1] < losses[0], f"the nll went from {losses[0]} to {losses[-1]}"
        return f"{took}, nll {losses[0]:.4f} → {losses[-1]:.4f}"

    return check


def _batch(device: torch.device, vocabulary: int, *, segments: int = 4, length: int = 128) -> Batch:
    """A packed row of random tokens; the reference's log-probs are those of a uniform distribution."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (segments, length), generator=generator)
    labels = torch.cat([tokens[:, 1:], torch.full((segments, 1), IGNORE)], dim=1).view(1, -1)
    return Batch(
        tokens=tokens.view(1, -1),
        labels=labels,
        position_ids=torch.arange(length).repeat(segments)[None],
        segment=torch.arange(segments).repeat_interleave(length),
        reference=torch.where(labels[0] == IGNORE, 0.0, -torch.tensor(float(vocabulary)).log()),
        cu_seqlens=(torch.arange(segments + 1) * length).int(),
        max_seqlen=length,
        lengths=torch.full((segments,), float(length - 1)),
        quality=torch.ones(segments),
        trajectory=torch.arange(segments),
    ).to(device)


CHECKS: dict[str, Callable[[Platform], str]] = {
    "matmul in bf16": _matmul_bf16,
    **{f"matmul in FP8 {recipe}": _matmul_fp8(recipe) for recipe in FP8_RECIPES},
    "Triton statistics": _triton("statistics"),
    "Triton statistics with entropy": _triton("entropy"),
    "Triton gradient": _triton("gradient"),
    "attention, local": _attention("local"),
    "attention, Transformer Engine": _attention("transformer_engine"),
    "collectives": _collectives,
    "training step, local": _training_step("local"),
    "training step, Transformer Engine": _training_step("transformer_engine"),
}
WITH_TRANSFORMER_ENGINE = frozenset(name for name in CHECKS if "Transformer Engine" in name or "FP8" in name)
