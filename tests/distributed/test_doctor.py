"""The doctor's report, and FP8 recipes rejected on machines that cannot run them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.data.batch_builder import RowShape
from megatron_iwsft.distributed.capabilities import fp8_refusal, transformer_engine
from megatron_iwsft.errors import ConfigError
from tests.support import ROOT, run_python, tiny
from tests.support.transformer_engine import te


@pytest.mark.command
def test_the_doctor_reports_versions_and_chosen_implementations() -> None:
    found = run_python("tools/doctor.py")
    assert found.returncode == 0, found.stderr
    assert torch.__version__ in found.stdout
    assert importlib.metadata.version("megatron-core") in found.stdout
    engine, why = transformer_engine()
    line = next(line for line in found.stdout.splitlines() if "Transformer Engine" in line)
    assert (engine or why) in line and line.startswith("  " if engine else "! ")
    takes = dict(
        line.split(maxsplit=1)
        for line in found.stdout.partition("Implementations used on this machine\n")[2].splitlines()
    )
    assert {"layers", "attention", "log-probs", "optimizer", "FP8"} < set(takes)
    if not torch.cuda.is_available():
        assert takes["optimizer"].startswith("torch's AdamW") and takes["FP8"].startswith("none")


@pytest.fixture
def broken_engine(tmp_path: Path) -> dict[str, str]:
    """An environment in which Transformer Engine is installed, and importing it fails as with libraries of another version."""
    package = tmp_path / "broken" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('libcublasLt.so.13 was built for another driver')\n")
    return {"PYTHONPATH": f"{ROOT}:{package.parent}"}


@pytest.mark.command
def test_the_doctor_survives_a_broken_transformer_engine(broken_engine: dict[str, str]) -> None:
    found = run_python("tools/doctor.py", **broken_engine)
    assert found.returncode == 0, found.stderr
    assert "cannot be imported: RuntimeError: libcublasLt.so.13 was built for another driver" in found.stdout
    assert "training on a GPU is refused" in found.stdout


@pytest.mark.slow
@pytest.mark.command
def test_a_broken_transformer_engine_fails_its_own_checks_only(broken_engine: dict[str, str], tmp_path: Path) -> None:
    checks = ["attention, local", "matmul in FP8 tensorwise", "attention, Transformer Engine", "training step, local"]
    code = "import sys; from megatron_iwsft.train.machine_checks import work; work(*sys.argv[1:])"
    table, file = "megatron_iwsft.train.machine_checks:CHECKS", tmp_path / "outcomes"
    done = run_python("-c", code, table, file, *checks, IWSFT_DEVICE="cpu", OMP_NUM_THREADS="1", **broken_engine)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [outcome["status"] for outcome in found] == ["ok", "failed", "failed", "ok"], found
    assert all("libcublasLt.so.13 was built for another driver" in outcome["detail"] for outcome in found[1:3])


@pytest.mark.command
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_broken_transformer_engine_is_no_silent_fall_back(device: str, broken_engine: dict[str, str]) -> None:
    """On a CPU too: Megatron-Core does without one that raises ImportError, but fails with any other error."""
    code = f"""
import torch
torch.cuda.is_available = lambda: {device == "cuda"}
from megatron_iwsft.distributed.context import prepare
from megatron_iwsft.errors import ConfigError
try:
    prepare({device!r})
except ConfigError as error:
    print(error)
"""
    found = run_python("-c", code, **broken_engine)
    assert "Transformer Engine is installed, but cannot be imported: RuntimeError: libcublasLt.so.13" in found.stdout, (
        found.stderr
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("recipe", "generation"),
    [("delayed", "Ada, Hopper"), ("tensorwise", "Ada, Hopper"), ("blockwise", "Hopper"), ("mxfp8", "Blackwell")],
)
def test_an_fp8_recipe_is_rejected_with_what_it_needs(recipe: str, generation: str, tmp_path: Path) -> None:
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.setup import start

    assert generation in str(fp8_refusal(recipe)) and "torch sees none" in str(fp8_refusal(recipe))
    corpus = tiny.token_corpus(tmp_path, [20, 30])
    text = f"""
run: {{name: x, dir: {tmp_path}/x}}
model: {{config: {tiny.model_config()}}}
data: {{corpus: {corpus.directory}, seq_length: 64, max_steps: 1}}
precision: {{fp8: {recipe}}}
objective: {{name: sft}}
"""
    with pytest.raises(ConfigError, match=f"precision.fp8 {recipe} needs a GPU"):
        start(check(parse_config(text, [], where="test"), world_size=1))


def test_rows_are_aligned_for_fp8() -> None:
    shape = RowShape.of(tensor=2, context=2, row_length=100, alignment=16)
    assert shape.fit(90) % (2 * 2 * 2 * 16) == 0


def built_with_transformer_engine(platform, recipe: str | None) -> tuple[list[str], dict]:
    """Class names in the first layer of a model with Transformer Engine, and its FP8 settings."""
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.model.gpt import ModelSettings, _block_spec, _transformer_config

    arch = Architecture.from_hf(tiny.model_config("qwen3", head_dim=16), where="test")
    settings = ModelSettings(
        torch.bfloat16, backend="transformer_engine", fp8=recipe, bf16_edges=(1, 0) if recipe else (0, 0)
    )
    config = _transformer_config(arch, platform.parallel().layout, platform, settings)
    layer = _block_spec(arch, config, settings, None).submodules
    attention = layer.self_attention.submodules
    names = [x.__name__ for x in (attention.linear_qkv, attention.core_attention, attention.q_layernorm)]
    return names, {k: getattr(config, k) for k in ("fp8", "fp8_recipe", "num_layers_at_start_in_bf16")}


@te
@pytest.mark.parametrize(
    ("recipe", "fp8"), [(None, None), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_the_transformer_engine_layer_spec_is_built_without_a_gpu(recipe: str | None, fp8: str | None) -> None:
    from megatron_iwsft.testing import run_distributed

    names, settings = run_distributed(built_with_transformer_engine, 1, recipe)[0]
    assert names == ["TELayerNormColumnParallelLinear", "TEDotProductAttention", "TENorm"]
    assert settings["fp8"] == fp8
    if recipe is not None:
        assert settings["fp8_recipe"] == recipe and settings["num_layers_at_start_in_bf16"] == 1
