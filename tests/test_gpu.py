"""Tests that need a GPU: kernels against float64, Transformer Engine against the local backend, FP8 training and export.

`bash tests/run.sh --gpu` runs them and prints what they measure.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.distributed.capabilities import fp8_refusal, transformer_engine, variable_length_attention
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit, SafetensorsDirectory
from megatron_iwsft.objectives.functions import Settings, iw_sft
from megatron_iwsft.ops import logits as rows
from megatron_iwsft.testing import comparable_metrics, run_distributed, whole_gradients
from megatron_iwsft.train.frozen_models import START_TOLERANCE
from tests.support import events, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

LENGTHS = [64 + (i * 151) % 400 for i in range(64)]
SEQ_LENGTH = 512
MODEL = tiny.model_config(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, initializer_range=0.05
) | {"max_position_embeddings": 1024}  # fmt: skip
# Families whose layers are built from other parts.
MODELS = {
    "qwen2": MODEL,
    "smollm3": MODEL | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]},
    "gemma3_text": MODEL
    | {
        "model_type": "gemma3_text",
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 500.0,
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return tiny.token_corpus(tmp_path_factory.mktemp("gpu"), LENGTHS, vocab_size=300, scores=True)


def error(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


@pytest.mark.skipif(not rows.has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 300, 4096, 151936, 151937])
def test_kernels_agree_with_float64(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator("cuda").manual_seed(columns)
    n = 37
    storage = (torch.randn(n, columns + 8, generator=generator, device="cuda") * 8).to(dtype)
    logits = storage[:, :columns]
    target = torch.randint(-columns, 2 * columns, (n,), generator=generator, device="cuda")
    found = torch.empty(4, n, device="cuda")
    rows.row_statistics(logits, target, out=found)
    exact = logits.double()
    shifted = exact - exact.max(1, keepdim=True).values
    here = (target >= 0) & (target < columns)
    picked = torch.where(here, exact.gather(1, target.clamp(0, columns - 1)[:, None])[:, 0], 0.0)
    assert torch.equal(found[0].double(), exact.max(1).values) and torch.equal(found[2].double(), picked)
    torch.testing.assert_close(found[1].double(), shifted.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[3].double(), (shifted.exp() * shifted).sum(1), rtol=1e-5, atol=1e-6)

    lse, grad = exact.logsumexp(1).float(), torch.randn(n, generator=generator, device="cuda")
    beyond = storage[:, columns:].clone()
    expected = -grad.double()[:, None] * exact.softmax(1)
    at = here.nonzero()[:, 0]
    expected[at, target[at]] += grad.double()[at]
    rows.logits_gradient(logits, target, lse, grad)
    assert error(logits, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(storage[:, columns:], beyond), "wrote past the end of the row"


def operator(platform, tokens: int, vocabulary: int, hidden_size: int, dtype: torch.dtype) -> list[float]:
    """Relative errors of value and both gradients against full logits in float64."""
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    generator = torch.Generator("cuda").manual_seed(0)
    options = dict(generator=generator, device="cuda")
    hidden = torch.randn(tokens, hidden_size, **options).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, **options) / hidden_size**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), **options)
    targets[torch.rand(tokens, **options) < 0.3] = -100
    grad = torch.randn(tokens, **options)
    logprobs = vocab_parallel_logprob(hidden, weight, targets, group=platform.parallel().tp, vocab_size=vocabulary)
    logprobs.backward(grad)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.log_softmax(h @ w.T, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    exact.backward(grad.double())
    return [error(logprobs.detach(), exact.detach()), error(hidden.grad, h.grad), error(weight.grad, w.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_agrees_with_float64(dtype: torch.dtype) -> None:
    found = run_distributed(operator, 1, 1500, 20011, 256, dtype, device="cuda")[0]
    print(f"\noperator, {dtype}: value, d hidden and d weight off by {', '.join(f'{x:.1e}' for x in found)}")
    assert max(found) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def gradients(platform, corpus_dir: str, model: dict, cases: list[tuple[str, str, str]]):
    """(loss, complete gradients) of one global batch for each (dtype, backend, packing)."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    corpus, parallel, arch = Corpus.open(corpus_dir), platform.parallel(), Architecture.from_hf(model, where="test")
    out = {}
    for case in cases:
        name, backend, packing = case
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        policy = build_model(arch, parallel, platform, ModelSettings(dtype, backend=backend))
        load_weights(policy, RandomInit(arch, 5), parallel)
        chunks = wrap_for_gradients(policy, Optimizer(distributed=False))
        sampler = Sampler(
            corpus.lengths, corpus.scores, seq_length=SEQ_LENGTH, packing=packing, global_batch_size=len(corpus),
            quality=Quality("weight"), seed=3,
        )  # fmt: skip
        builder = BatchBuilder(
            corpus, sampler, RowShape.of(tensor=1, context=1, row_length=SEQ_LENGTH if packing == "best_fit" else None),
            micro_batch_size=1, reference=lambda i: np.full(int(corpus.lengths[i]), -6.2, np.float32),
        )  # fmt: skip
        step = TrainStep(chunks, parallel, platform.device, iw_sft, Settings("sequence", 1.0, (0.2, 3.0), "tokens"))
        loss = step.forward_backward(builder.at_step(0))["loss"]
        out[case] = loss, {k: v.cpu() for k, v in whole_gradients(chunks, parallel).items()}
    return out


@pytest.mark.parametrize("family", MODELS)
def test_backends_and_packing_agree(family: str, corpus: Corpus) -> None:
    """The batch is all of the corpus, so packed and unpacked sums are equal. bf16 is compared with the local backend's error in bf16."""
    exact = ("fp32", "local", "none")
    local, local_packed = ("bf16", "local", "none"), ("bf16", "local", "best_fit")
    cases = [exact, ("fp32", "local", "best_fit"), local, local_packed]
    if transformer_engine()[0] is not None:
        cases += [("bf16", "transformer_engine", "none"), ("bf16", "transformer_engine", "best_fit")]
    found = run_distributed(gradients, 1, str(corpus.directory), MODELS[family], cases, device="cuda")[0]
    loss, want = found[exact]
    off = {}
    for case, (value, grads) in found.items():
        each = {name: error(grads[name], want[name]) for name in want}
        off[case] = (abs(value - loss) / abs(loss), max(each.values()))
        print(f"\n{' '.join(case):40} loss off by {off[case][0]:.1e}, worst gradient by {off[case][1]:.1e}", end="")
    assert max(off["fp32", "local", "best_fit"]) < 1e-4
    for case in cases[2:]:
        assert off[case][0] < 2e-3 and off[case][1] < 5e-2, case
        assert off[case][1] < 3 * off[local][1] + 1e-3, case


def run_config(corpus: Corpus, directory: Path, name: str, precision: dict, *overrides: str):
    config = {
        "run": {"name": name, "dir": str(directory / name), "seed": 7},
        "model": {"config": MODEL},
        "data": {"corpus": str(corpus.directory), "seq_length": SEQ_LENGTH, "global_batch_size": 8, "epochs": 1000, "max_steps": 6},
        "objective": {"name": "iw_sft"},
        "precision": precision,
        "optimizer": {"lr": 1.0e-3},
        "checkpoint": {"every": 3, "keep": 9},
        "export": {"at_end": True},
    }  # fmt: skip
    return parse_config(json.dumps(config), list(overrides), where=name)


PRECISIONS: dict[str, dict] = {"bf16": {"dtype": "bf16"}} | {
    recipe: {"dtype": "bf16", "fp8": recipe} for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
}
PRECISIONS["tensorwise-edges"] = PRECISIONS["tensorwise"] | {"bf16_first_layers": 1, "bf16_last_layers": 1}
PRECISIONS["tensorwise-parameters"] = PRECISIONS["tensorwise"] | {"fp8_parameters": True}


def all_runs(platform, corpus_dir: str, directory: Path, name: str) -> list[str]:
    """Runs of one precision: cached, live, offloaded in bf16, resumed, long. Returns the Python modules of the first layer's submodules."""
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.setup import start
    from megatron_iwsft.train.trainer import train

    corpus, precision = Corpus.open(corpus_dir), PRECISIONS[name]
    source = ["reference.source=live"] if precision.get("fp8") == "delayed" else []  # which has no cached reference
    if not source:
        precompute_reference(run_config(corpus, directory, "cached", precision))
    train(run_config(corpus, directory, "cached", precision, *source))
    train(run_config(corpus, directory, "live", precision, "reference.source=live"))
    if "fp8" not in precision:
        options = ("reference.source=live", "reference.offload=true", "checkpoint.asynchronous=true")
        train(run_config(corpus, directory, "offloaded", precision, *options))
    shutil.copytree(directory / "cached", directory / "resumed")
    shutil.rmtree(directory / "resumed" / "checkpoints" / "step-00000006")
    train(run_config(corpus, directory, "resumed", precision, *source))
    long = ("objective.name=sft", "data.max_steps=200", "checkpoint.every=0", "export.at_end=false")
    train(run_config(corpus, directory, "long", precision, *long))
    run = start(check(run_config(corpus, directory, "looked-at", precision), world_size=platform.world_size))
    return sorted({type(part).__module__ for part in run.build(run.policy)[0].decoder.layers[0].modules()})


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory):
    """The directory of a precision's runs, trained in a job of their own when a test first asks for them."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        refusal = fp8_refusal(PRECISIONS[name]["fp8"]) if "fp8" in PRECISIONS[name] else None
        if refusal:
            pytest.skip(f"{name} {refusal}")
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            (modules,) = run_distributed(all_runs, 1, str(corpus.directory), made[name], name, device="cuda")
            (made[name] / "modules.json").write_text(json.dumps(modules))
        if not (made[name] / "modules.json").exists():
            pytest.fail("its runs failed: see the first test that uses them")
        return made[name]

    return of


every_precision = pytest.mark.parametrize("name", PRECISIONS)


@every_precision
def test_weights_start_at_one(runs, name: str) -> None:
    for source in ("cached", "live"):
        first = comparable_metrics(runs(name) / source)[0]
        ratio, weight = first["abs_log_ratio"], abs(first["weight_max"] - 1)
        print(
            f"\n{name}, {source}: mean |log-ratio| per token {ratio:.2e}, largest weight off 1 by {weight:.2e}", end=""
        )
        allowed = START_TOLERANCE["fp8" if "fp8" in PRECISIONS[name] else "bf16"]
        assert ratio <= allowed and weight <= 2 * allowed, source


def test_an_offloaded_reference_and_background_saves_change_nothing(runs) -> None:
    live, offloaded = (comparable_metrics(runs("bf16") / kind) for kind in ("live", "offloaded"))
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(live, offloaded, strict=True))
    print(f"\noffloaded: losses {apart:.1e} apart", end="")
    assert apart < 1e-3  # some of a GPU's sums have no fixed order
    saved = {path.name for path in (runs("bf16") / "offloaded" / "checkpoints").glob("step-*")}
    assert saved == {"step-00000003", "step-00000006"}


@every_precision
def test_a_resumed_run_continues(runs, name: str) -> None:
    whole, resumed = (comparable_metrics(runs(name) / kind) for kind in ("cached", "resumed"))
    (event,) = events(runs(name) / "resumed", "resumed")
    assert event["step"] == 3 and len(whole) == len(resumed) == 6
    apart = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(whole, resumed, strict=True))
    print(f"\n{name}: resumed, losses {apart:.1e} apart", end="")
    assert apart < 1e-3  # some of a GPU's sums have no fixed order


@every_precision
def test_fp8_losses_stay_close_to_bf16(runs, name: str) -> None:
    """At most 0.05 nats per token apart on average over the first 50 steps, 0.1 over all 200."""
    found, bf16 = ([m["loss"] for m in comparable_metrics(runs(n) / "long")] for n in (name, "bf16"))
    assert bf16[-1] < bf16[0] - 0.5
    apart = [abs(a - b) for a, b in zip(found, bf16, strict=True)]
    early, whole = statistics.mean(apart[:50]), statistics.mean(apart)
    print(f"\n{name}: {early:.4f} nats from bf16 over 50 steps, {whole:.4f} over 200, at most {max(apart):.4f}", end="")
    assert early < 0.05 and whole < 0.1


@every_precision
def test_exports_are_complete_and_in_bf16(runs, name: str) -> None:
    from transformers import AutoModelForCausalLM

    directory = runs(name) / "cached" / "hf" / "step-00000006"
    assert SafetensorsDirectory(directory).architecture.hidden_size == MODEL["hidden_size"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_transformer_engine_is_used_where_it_is_installed(runs) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    assert transformer_engine()[0] is not None, transformer_engine()[1]
    modules = json.loads((runs("bf16") / "modules.json").read_text())
    assert "megatron_iwsft.model.packed_attention" not in modules
    assert any("transformer_engine" in module for module in modules)


def chosen_attention(platform, corpus_dir: str) -> int:
    """How often the local backend calls variable-length attention in one bf16 step."""
    from megatron_iwsft.model import packed_attention as attention

    calls: list[int] = []
    real = attention._attend_at_once
    attention._attend_at_once = lambda *args: calls.append(1) or real(*args)
    gradients(platform, corpus_dir, MODEL, [("bf16", "local", "best_fit")])
    return len(calls)


def test_the_local_backend_uses_variable_length_attention(corpus: Corpus) -> None:
    can, why = variable_length_attention()
    if not can:
        pytest.skip(why)
    assert run_distributed(chosen_attention, 1, str(corpus.directory), device="cuda")[0] > 0
