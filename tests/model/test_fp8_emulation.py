"""Emulated FP8: rounding against an element-by-element reference, the three products of a linear layer, and models that train with it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.testing import comparable_metrics, run_distributed
from tests.support import tiny
from tests.support.adapters import TrainedAdapters

pytestmark = pytest.mark.numerics

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# mantissa bits, smallest exponent of a normal number, largest value
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}


def nearest(value: float, dtype: torch.dtype) -> float:
    """Round to nearest, ties to even, saturating: by the definition of the format."""
    mantissa, lowest, largest = FORMATS[dtype]
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), lowest) - mantissa)
    return math.copysign(min(round(abs(value) / step) * step, largest), value)


def rounded(x: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None) -> torch.Tensor:
    """Every element by itself, with the scale of the elements that share its block."""
    out, largest = torch.empty_like(x), FORMATS[dtype][2]
    down, across = block or x.shape
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            top, left = i // down * down, j // across * across
            maximum = float(x[top : top + down, left : left + across].abs().max())
            scale = (
                torch.tensor(maximum) / largest
                if block is None
                else torch.tensor(2.0 ** math.ceil(math.log2(maximum / largest)))
            )
            out[i, j] = nearest(float(x[i, j] / scale), dtype) * scale
    return out


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("block", [None, (1, 32), (1, 128), (128, 128)])
def test_rounding(dtype: torch.dtype, block: tuple[int, int] | None) -> None:
    from megatron_iwsft.model.fp8_emulation import round_to_fp8

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 150, generator=generator) * torch.logspace(-3, 3, 150)
    assert torch.equal(round_to_fp8(x, dtype, block=block), rounded(x, dtype, block))
    assert not round_to_fp8(torch.zeros(3, 40), dtype, block=block).any()


def test_values_beyond_the_scale_saturate() -> None:
    from megatron_iwsft.model.fp8_emulation import round_to_fp8

    found = round_to_fp8(torch.tensor([[1.0, 2.0, -8.0]]), E4M3, maximum=torch.tensor(4.0))
    assert found.tolist() == [[1.0, 2.0, -4.0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 8.0), ({"history": 1}, 2.0), ({"history": 2}, 4.0), ({"algorithm": "most_recent"}, 2.0)],
)
def test_delayed_scaling_fits_the_history_that_is_asked_for(options: dict, expected: float) -> None:
    from megatron_iwsft.model.fp8_emulation import Fp8Rounding

    rounding = Fp8Rounding("delayed", **options)
    for largest in (8.0, 4.0, 2.0):
        rounding.input(torch.tensor([[largest]]))
    assert rounding.input(torch.tensor([[100.0]])).item() == expected, (
        "saturates at the largest value that the scale fits"
    )


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_each_product_rounds_both_operands_along_its_sum(recipe: str) -> None:
    from megatron_iwsft.model.fp8_emulation import Fp8Rounding, _product

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1, 160, generator=generator).requires_grad_()
    weight = torch.randn(48, 160, generator=generator).requires_grad_()
    grad = torch.randn(40, 1, 48, generator=generator)
    rounding = Fp8Rounding(recipe)
    for _ in range(2):  # delayed scaling takes its scales from the pass before: here the same values
        x.grad = weight.grad = None
        out = _product(x, weight, rounding)
        out.backward(grad)
    backward = E5M2 if FP8_RECIPES[recipe].format == "hybrid" else E4M3
    line, square = {"blockwise": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32))}.get(recipe, (None, None))
    X, W, G = x.detach()[:, 0], weight.detach(), grad[:, 0]

    def along_columns(values, dtype, block):  # blocks run down the columns
        return rounded(values.t().contiguous(), dtype, block).t()

    expected = rounded(X, E4M3, line) @ rounded(W, E4M3, square).t()
    torch.testing.assert_close(out.detach()[:, 0], expected, rtol=1e-5, atol=1e-5)
    expected = rounded(G, backward, line) @ along_columns(W, E4M3, square)
    torch.testing.assert_close(x.grad[:, 0], expected, rtol=1e-5, atol=1e-5)
    expected = along_columns(G, backward, line).t() @ along_columns(X, E4M3, line)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


def config(corpus, directory, name: str, *overrides: str):
    text = f"""
run: {{name: {name}, dir: {directory}/{name}, seed: 1}}
model: {{config: {tiny.model_config(hidden_size=64, intermediate_size=128)}}}
data: {{corpus: {corpus.directory}, seq_length: 128, global_batch_size: 4, max_steps: 3}}
objective: {{name: iw_sft}}
reference: {{source: live}}
optimizer: {{lr: 1.0e-3}}
checkpoint: {{every: 0}}
"""
    return parse_config(text, list(overrides), where=name)


def losses(platform, configs) -> dict[str, tuple[float, float]]:
    """Per run (the first step's loss, its mean |log-ratio| of policy and reference)."""
    from pathlib import Path

    from megatron_iwsft.train.trainer import train

    out = {}
    for each in configs:
        train(each)
        first = comparable_metrics(Path(each.run.dir))[0]
        out[each.run.name] = first["loss"], first["abs_log_ratio"]
    return out


@pytest.mark.slow
@pytest.mark.parallel
def test_emulated_runs(tmp_path) -> None:
    """Every recipe trains, within FP8's rounding of bf16 and not equal to it; a model with all layers in bf16 is equal to it."""
    corpus = tiny.token_corpus(tmp_path, [40] * 12)
    emulated = "precision.fp8_emulation=true"
    configs = [config(corpus, tmp_path, "bf16")]
    configs += [config(corpus, tmp_path, recipe, f"precision.fp8={recipe}", emulated) for recipe in FP8_RECIPES]
    edges = ("precision.bf16_first_layers=3", "precision.bf16_last_layers=1")
    configs.append(config(corpus, tmp_path, "edges", "precision.fp8=tensorwise", emulated, *edges))
    on_base = ("adapter.rank=4", "reference.source=base", "optimizer.lr=1e-2")
    configs.append(config(corpus, tmp_path, "adapters", "precision.fp8=tensorwise", emulated, *on_base))
    (found,) = run_distributed(losses, 1, configs)
    assert found.pop("adapters") == (found["tensorwise"][0], 0.0), "B is zero: the base in FP8, and its own reference"
    first, *_, last = comparable_metrics(tmp_path / "adapters")
    assert last["abs_log_ratio"] > 0 and last["nll"] != first["nll"], "adapters move the policy alone"
    bf16, _ = found.pop("bf16")
    assert found.pop("edges")[0] == bf16
    for recipe, (loss, ratio) in found.items():
        assert 0 < abs(loss - bf16) / bf16 < 0.05, recipe
        assert ratio == 0 or recipe == "delayed", recipe  # policy and reference: the same arithmetic


def adapted_layer(platform) -> None:
    from megatron_iwsft.hf.adapters import AdapterSettings
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.model.adapters import add_adapters
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_adapters, load_weights

    arch = Architecture.from_hf(tiny.model_config(), where="test")
    settings, parallel = AdapterSettings.of(arch, rank=4, alpha=8.0, targets=["fc2"]), platform.parallel()
    numbers = ModelSettings(dtype=torch.bfloat16, fp8="tensorwise", fp8_emulation=True)
    (model,) = build_model(arch, parallel, platform, numbers)
    load_weights([model], RandomInit(arch, 0), parallel)
    add_adapters([model], settings, parallel)
    load_adapters([model], settings, TrainedAdapters(arch, settings, 5), parallel)
    layer = model.decoder.layers[0].mlp.linear_fc2
    x = torch.randn(16, 1, layer.weight.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    with model.adapters.off():
        base, _ = layer(x)
    assert not torch.equal(base, torch.nn.functional.linear(x, layer.weight)), "the base is rounded to FP8"
    out, _ = layer(x)
    a, b = layer.adapter.a, layer.adapter.b
    assert torch.equal(out[:, 0], torch.addmm(base[:, 0], x[:, 0] @ a.t() * 2.0, b.t())), "the adapter is not"
    out.float().square().sum().backward()
    assert layer.weight.grad is None and a.grad.dtype == b.grad.dtype == torch.bfloat16
    grad = 2 * out.detach()[:, 0].float()
    torch.testing.assert_close(b.grad.float(), grad.t() @ (x[:, 0] @ a.t() * 2.0).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parallel
def test_adapters_of_an_fp8_base_are_in_bf16() -> None:
    run_distributed(adapted_layer, 1)


@pytest.mark.parallel
def test_emulation_with_tensor_and_sequence_parallelism(tmp_path) -> None:
    """Blocks of mxfp8 do not cross ranks here, so only the order of sums differs."""
    corpus = tiny.token_corpus(tmp_path, [40] * 12)
    mxfp8 = ("precision.fp8=mxfp8", "precision.fp8_emulation=true")
    (one,) = run_distributed(losses, 1, [config(corpus, tmp_path, "one", *mxfp8)])
    layout = ("parallel.tensor=2", "parallel.sequence=true")
    two = run_distributed(losses, 2, [config(corpus, tmp_path, "two", *mxfp8, *layout)])[0]
    assert abs(one["one"][0] - two["two"][0]) / one["one"][0] < 2e-3


def test_emulation_needs_a_recipe(tmp_path) -> None:
    corpus = tiny.token_corpus(tmp_path, [20, 30])
    with pytest.raises(ConfigError, match="need an fp8 recipe"):
        config(corpus, tmp_path, "x", "precision.fp8_emulation=true")
    with pytest.raises(ConfigError, match="fp8_emulation keeps parameters"):
        config(
            corpus,
            tmp_path,
            "x",
            "precision.fp8=blockwise",
            "precision.fp8_emulation=true",
            "precision.fp8_parameters=true",
        )
