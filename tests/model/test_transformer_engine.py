"""Transformer Engine's layers, on a CPU: what they compute, which settings reach them, and how they are filled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.objectives.functions import Settings, sft
from megatron_iwsft.testing import run_distributed
from tests.support import tiny
from tests.support.transformer_engine import FAMILIES, architecture, as_on_hopper, packed_row, te

BACKENDS = ("local", "transformer_engine")


def build(platform: Any, family: str, parallel: Any = None, *, seed: int = 1, **settings: Any) -> list[Any]:
    """A model in bf16 with random weights; to be called within `as_on_hopper`."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights

    parallel, arch = parallel or platform.parallel(), architecture(family)
    policy = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, **settings))
    load_weights(policy, RandomInit(arch, seed), parallel)
    return policy


def two_steps(platform: Any, policy: list[Any], parallel: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each of two steps, the second one's gradients by checkpoint name, each step of two micro-batches."""
    from megatron_iwsft.model.parameters import checkpoint_name
    from megatron_iwsft.train.optim import wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    chunks = wrap_for_gradients(policy, Optimizer(distributed=False))
    step = TrainStep(chunks, parallel, platform.device, sft, Settings())
    batches = [packed_row([20, 13, 31]), packed_row([40, 24], seed=1)]
    losses = [step.forward_backward(batches)["loss"] for _ in range(2)]
    step.evaluate([batches])  # must leave the gradients alone
    named = policy[0].trained_parameters()
    return losses, {checkpoint_name(policy[0], name): p.main_grad.clone() for name, p in named}


def assert_equal_steps(found: Any, expected: Any) -> None:
    """What `two_steps` gave for one backend is, within the rounding of bf16, what it gave for the other."""
    (losses, gradients), (wanted_losses, wanted) = found, expected
    assert losses == pytest.approx(wanted_losses, rel=1e-3), "bf16 rounding"
    assert losses[0] == losses[1], "the second step starts from gradients of 0"
    assert gradients.keys() == wanted.keys() and len(gradients) > 8
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < 0.05 * wanted[name].norm() + 1e-6, name


def computed(platform: Any, family: str, recompute: str) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """`two_steps` of each backend."""
    found = []
    for backend in BACKENDS:
        with as_on_hopper():
            parallel = platform.parallel()
            policy = build(platform, family, parallel, backend=backend, recompute=recompute)
            found.append(two_steps(platform, policy, parallel))
    return found


@te
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_compute_the_same(family: str, recompute: str) -> None:
    """Weight gradients of two micro-batches too, which Transformer Engine's matmuls add up in float32 buffers by themselves."""
    expected, found = run_distributed(computed, 1, family, recompute)[0]
    assert_equal_steps(found, expected)


def accumulation(platform: Any, family: str) -> tuple[set[bool], set[torch.dtype]]:
    """Whether the layers add weight gradients in their matmuls, and the types of the gradients that do not come that way."""
    from megatron_iwsft.model.gpt import forward
    from megatron_iwsft.train.optim import wrap_for_gradients

    with as_on_hopper():
        policy = build(platform, family, backend="transformer_engine")
        (chunk,) = wrap_for_gradients(policy, Optimizer(distributed=False))
        flags = {m.fuse_wgrad_accumulation for m in policy[0].modules() if hasattr(m, "fuse_wgrad_accumulation")}
        chunk.zero_grad_buffer()
        forward(chunk, packed_row([20, 13])).sum().backward()
    matrices = [p for n, p in policy[0].named_parameters() if ".linear_" in n and p.dim() == 2]
    return flags, {p.grad_added_to_main_grad for p in matrices}


@te
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_gradients_are_added_in_the_matmul_without_apex(family: str) -> None:
    assert run_distributed(accumulation, 1, family) == [({True}, {True})]


def fp8_masters(platform: Any, directory: Path | None) -> dict[str, Any]:
    """The optimizer's float32 parameters of a model with parameters in FP8, beside those of one in bf16.

    directory: for a checkpoint of the latter, from which the former takes its weights.
    """
    from megatron_iwsft.checkpoint.info import CheckpointInfo
    from megatron_iwsft.checkpoint.load import load
    from megatron_iwsft.checkpoint.state import TrainState
    from megatron_iwsft.checkpoint.writer import CheckpointWriter
    from megatron_iwsft.distributed.mcore_compat import optimizer_shards, unquantized_copy
    from megatron_iwsft.model.parameters import checkpoint_name
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

    found = {}
    for backend in BACKENDS:
        options = dict(fp8="tensorwise", fp8_parameters=True) if backend != "local" else {}
        with as_on_hopper():
            policy = build(platform, "dense", backend=backend, seed=2 if directory and options else 1, **options)
            if directory is not None and options:
                load(CheckpointInfo.read(directory), TrainState(policy))
            elif directory is not None:
                CheckpointWriter(directory, architecture("dense")).save(TrainState(policy))
            chunks = wrap_for_gradients(policy, Optimizer())
            optimizer = build_optimizer(chunks, Optimizer(), torch.bfloat16)
            named = {id(p): (checkpoint_name(policy[0], n), p) for n, p in policy[0].named_parameters()}
            found[backend] = {
                named[id(shard.parameter)][0]: shard.main.detach().flatten().clone()
                for shard in optimizer_shards(optimizer)
            }
    found["kept"] = [name for name, p in named.values() if unquantized_copy(p) is not None]
    found["quantised"] = [name for name, p in named.values() if hasattr(p, "_data")]
    return found


@te
@pytest.mark.parametrize("source", ["safetensors", "checkpoint"])
def test_the_optimizer_of_fp8_parameters_starts_from_the_weights_that_were_loaded(source: str, tmp_path: Path) -> None:
    found = run_distributed(fp8_masters, 1, tmp_path if source == "checkpoint" else None)[0]
    expected, masters = (found[backend] for backend in BACKENDS)
    assert len(found["quantised"]) == 8, "four matrices in each of two layers"
    assert masters.keys() == expected.keys()
    assert [name for name in masters if not torch.equal(masters[name], expected[name])] == []
    assert found["kept"] == [], "copies on the host that nothing reads any more"


def quantised_weights(platform: Any) -> tuple[list[dict[str, int]], int, list[str]]:
    """Weight → how often it was quantised, in each of two steps of three micro-batches, an evaluation, and a step after it.

    Also the number of quantised weights, and those that matmuls read otherwise than the parameters give them.
    """
    import transformer_engine_torch as kernels

    from megatron_iwsft.distributed.mcore_compat import prepare_gradients, update_parameters
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    with as_on_hopper():
        parallel, options = platform.parallel(), Optimizer(lr=1e-2)
        policy = build(platform, "dense", parallel, backend="transformer_engine", fp8="tensorwise")
        chunks = wrap_for_gradients(policy, options)
        optimizer = build_optimizer(chunks, options, torch.bfloat16)
        step = TrainStep(chunks, parallel, platform.device, sft, Settings())
        layers = {name: m for name, m in policy[0].named_modules() if hasattr(m, "_fp8_workspaces")}
        names = {layer.weight.data_ptr(): name for name, layer in layers.items() if hasattr(layer, "weight")}
        counts: Counter[str] = Counter()
        quantize = kernels.quantize

        def counting(x: torch.Tensor, *others: Any) -> Any:
            counts.update(names[x.data_ptr()] for _ in range(x.data_ptr() in names))
            return quantize(x, *others)

        found, stale = [], []
        batches = [packed_row([20, 13, 31], seed=seed) for seed in range(3)]
        with mock.patch.object(kernels, "quantize", counting):
            for trains in (True, True, False, True):
                if trains:
                    step.forward_backward(batches)
                else:
                    step.evaluate([batches])
                found.append(dict(counts))
                counts.clear()
                for name in names.values():
                    weight = layers[name].weight
                    cached = layers[name]._fp8_workspaces["weight"]
                    same = torch.equal(cached._data, quantize(weight.detach(), cached._get_quantizer())._data)
                    stale += [] if same else [name]
                if trains:
                    update_parameters(optimizer, prepare_gradients(optimizer))
    return found, len(names), stale


@te
def test_fp8_weights_are_quantised_once_a_step() -> None:
    """At its first micro-batch, so after the update before; later micro-batches read the same."""
    found, count, stale = run_distributed(quantised_weights, 1)[0]
    assert count == 8, "four matrices in each of two layers"
    assert [set(counts.values()) for counts in found] == [{1}] * 4 and {len(counts) for counts in found} == {count}
    assert stale == []


def parameters_of(platform: Any, recipe: FP8Recipe) -> Any:
    """Of delayed, the scales of parameters before the first update. Of mxfp8, what moving a parameter into a buffer says."""
    from transformer_engine.pytorch import MXFP8Quantizer
    from transformer_engine.pytorch.tensor.utils import replace_raw_data
    from transformer_engine_torch import DType

    with as_on_hopper():
        if recipe == "delayed":
            (model,) = build(platform, "dense", backend="transformer_engine", fp8=recipe, fp8_parameters=True)
            return {float(p._scale_inv) for p in model.parameters() if hasattr(p, "_scale_inv")}
        weight = MXFP8Quantizer(DType.kFloat8E4M3).make_empty((128, 128), dtype=torch.bfloat16, device="cpu")
        try:
            replace_raw_data(weight, torch.empty(128 * 128, dtype=torch.uint8))
        except NotImplementedError as error:
            return str(error)


@te
@pytest.mark.parametrize(("recipe", "found"), [("delayed", {1.0}), ("mxfp8", "not supported")])
def test_why_two_recipes_cannot_keep_parameters(recipe: FP8Recipe, found: Any) -> None:
    """If this fails, `no_parameters` of fp8_recipes.py can go."""
    assert FP8_RECIPES[recipe].no_parameters
    (said,) = run_distributed(parameters_of, 1, recipe)
    assert said == found or found in said


def chosen_communication(platform: Any, changes: dict[str, Any], asked: str | None) -> str:
    """How attention with a sliding window and context parallelism 2 exchanges keys and values, or why it refuses."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from megatron_iwsft.model.gpt import ModelSettings, build_model

    arch = Architecture.from_hf(tiny.model_config("mistral", num_hidden_layers=2, **changes), where="test")
    settings = ModelSettings(torch.bfloat16, backend="transformer_engine", context_communication=asked)
    with as_on_hopper(attention=TEDotProductAttention):
        try:
            (model,) = build_model(arch, platform.parallel(context=2), platform, settings)
        except ConfigError as error:
            return str(error)
    return {layer.self_attention.core_attention.cp_comm_type for layer in model.decoder.layers}.pop()


@te
@pytest.mark.parametrize(
    ("changes", "asked", "expected"),
    [
        ({"sliding_window": 64}, None, "a2a"),
        ({"sliding_window": 64}, "all_gather", "all_gather"),
        ({"sliding_window": 64}, "p2p", "p2p does not support the model's sliding windows"),
        (
            {"sliding_window": 64, "num_key_value_heads": 1},
            None,
            "does not divide a tensor-parallel rank's 1 key-value",
        ),
        ({"sliding_window": None}, None, "p2p"),
        ({"sliding_window": None}, "a2a", "a2a"),
    ],
)
def test_sliding_windows_choose_how_context_parallel_ranks_communicate(changes, asked, expected: str) -> None:
    found = run_distributed(chosen_communication, 2, changes, asked)
    assert found[0] == found[1] and expected in found[0]


def quantizable(platform: Any, recipe: FP8Recipe) -> dict[str, bool]:
    """Whether Transformer Engine quantises the fewest rows that a rank may have, and half of them."""
    from transformer_engine.pytorch import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        MXFP8Quantizer,
    )
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec
    from transformer_engine_torch import DType

    options = dict(rowwise=True, columnwise=True)
    quantizer = {
        "delayed": lambda: Float8Quantizer(torch.ones(1), torch.zeros(1), DType.kFloat8E4M3, **options),
        "tensorwise": lambda: Float8CurrentScalingQuantizer(DType.kFloat8E4M3, "cpu", **options),
        "blockwise": lambda: Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1, **options),
        "mxfp8": lambda: MXFP8Quantizer(DType.kFloat8E4M3, **options),
    }[recipe]()

    def gathered_in_fp8(rows: int) -> bool:
        return quantizer.is_quantizable(torch.empty(rows, 256))

    needs = FP8_RECIPES[recipe]
    for sequence_parallel in (False, True):
        assert_dim_for_fp8_exec(torch.empty(needs.rows(sequence_parallel=sequence_parallel), 256))
    rows = needs.rows(sequence_parallel=True)
    return {"whole": gathered_in_fp8(rows), "half": gathered_in_fp8(rows // 2)}


@te
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_rows_are_what_the_quantizers_need(recipe: FP8Recipe) -> None:
    """By half the rows, a recipe with a scale per block would be gathered in bf16, and quantised again by every rank."""
    found = run_distributed(quantizable, 1, recipe)[0]
    assert found == {"whole": True, "half": recipe in ("delayed", "tensorwise")}


def overlapped(platform: Any, recipe: FP8Recipe | None) -> tuple[list[Any], dict[str, Any], set[bool]]:
    """What userbuffers are asked for, and whether the projections of a tensor-parallel model gather through them."""
    from transformer_engine.pytorch.module import base

    from megatron_iwsft.distributed.userbuffers import start_userbuffers
    from megatron_iwsft.model.gpt import ModelSettings, build_model

    asked: list[Any] = []
    initialize = mock.patch.multiple(base, initialize_ub=lambda *a, **k: asked.append((a, k)), _ub_initialized=True)
    with as_on_hopper(), initialize:
        for _ in range(2):  # of policy and reference
            start_userbuffers(256, 64, tensor=2, fp8=recipe is not None, bf16=recipe is None)
        settings = ModelSettings(torch.bfloat16, backend="transformer_engine", fp8=recipe, overlap_tensor=True)
        parallel = platform.parallel(tensor=2, sequence=True)
        (model,) = build_model(architecture("dense"), parallel, platform, settings)
    ((arguments, options),) = asked
    modes = [mode.name for mode in options["quantization_modes"]]
    return (
        list(arguments),
        modes,
        {layer.self_attention.linear_qkv.ub_overlap_ag_fprop for layer in model.decoder.layers},
    )


def delayed_recipe(platform: Any) -> list[tuple[int, str]]:
    """History and algorithm of the recipe that Transformer Engine gets: by default, and as asked for."""
    from megatron.core.fp8_utils import get_fp8_recipe

    found = []
    for asked in ({}, {"amax_history": 4, "amax_algorithm": "most_recent"}):
        with as_on_hopper():
            (model,) = build(platform, "dense", backend="transformer_engine", fp8="delayed", **asked)
            recipe = get_fp8_recipe(model.config)
        found.append((recipe.amax_history_len, recipe.amax_compute_algo))
    return found


@te
def test_delayed_scaling_gets_its_history_and_algorithm() -> None:
    assert run_distributed(delayed_recipe, 1) == [[(1024, "max"), (4, "most_recent")]]


class Userbuffers:
    """Stands for the communicator of a tensor-parallel group of one rank."""

    def __init__(self) -> None:
        self.copied = torch.empty(0)

    def with_cublasmp(self) -> bool:
        return False

    def is_fp8_ubuf(self) -> bool:
        return True

    def copy_into_buffer(self, data: torch.Tensor, local_chunk: bool) -> None:
        self.copied = data

    def get_buffer(self, shape: list[int]) -> torch.Tensor:
        return self.copied


def gathered(platform: Any, recipe: FP8Recipe, rows: int) -> str:
    """What Transformer Engine says when userbuffers gather so many rows."""
    from transformer_engine.pytorch import Float8BlockQuantizer, MXFP8Quantizer
    from transformer_engine.pytorch.module.base import fill_userbuffers_buffer_for_all_gather
    from transformer_engine_torch import DType

    options = dict(rowwise=True, columnwise=False)
    if recipe == "mxfp8":
        quantizer: Any = MXFP8Quantizer(DType.kFloat8E4M3, **options)
        local = quantizer.make_empty((rows, 256), dtype=torch.bfloat16, device="cpu")
    else:
        quantizer = Float8BlockQuantizer(DType.kFloat8E4M3, block_scaling_dim=1, **options)
        local = torch.empty(rows, 256, dtype=torch.bfloat16)
    try:
        fill_userbuffers_buffer_for_all_gather(Userbuffers(), local, quantizer, platform.parallel().tp)
    except ValueError as error:
        return str(error)
    return "gathered"


def all_gathered(platform: Any) -> dict[tuple[FP8Recipe, int], str]:
    cases: list[tuple[FP8Recipe, int]] = [("mxfp8", 128), ("mxfp8", 32), ("blockwise", 128)]
    with as_on_hopper():
        return {case: gathered(platform, *case) for case in cases}


@te
def test_userbuffers_gather_what_the_config_allows() -> None:
    (found,) = run_distributed(all_gathered, 1)
    rows = FP8_RECIPES["mxfp8"].rows(sequence_parallel=True, overlap_tensor=True)
    assert found["mxfp8", rows] == "gathered" and rows == 128
    assert "divisible by 128" in found["mxfp8", 32]
    assert FP8_RECIPES["blockwise"].overlapped is None
    assert "Unsupported quantizer for Userbuffers" in found["blockwise", 128]


@te
@pytest.mark.parametrize(("recipe", "mode"), [(None, "NONE"), ("tensorwise", "FP8")])
def test_tensor_parallel_communication_overlaps_through_userbuffers(recipe: FP8Recipe | None, mode: str) -> None:
    for found in run_distributed(overlapped, 2, recipe):
        assert found == ([[256, 64], 2], [mode], {True})
