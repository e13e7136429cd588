"""The doctor's report, and FP8 recipes rejected on machines that cannot run them."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.data.batch_builder import RowShape
from megatron_iwsft.distributed.capabilities import (
    OLDEST_TRANSFORMER_ENGINE,
    TESTED_TRANSFORMER_ENGINE,
    fp8_refusal,
    transformer_engine,
    untested_transformer_engine,
)
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.errors import ConfigError
from tests.support import ROOT, run_python, tiny
from tests.support.transformer_engine import as_on_hopper, te


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


def engine_of(version: str, directory: Path) -> dict[str, str]:
    """An environment with a Transformer Engine that can be imported, of this version."""
    for name, text in {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch.py": "",
        f"transformer_engine-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return {"PYTHONPATH": f"{ROOT}:{directory}"}


@pytest.mark.command
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.13.0", "is installed, but too old: 1.13.0; 2.3 or newer is needed. Install one that works"),
        ("2.3.0", ""),
        ("2.31.0", "Transformer Engine 2.31.0 is newer than 2.20, the newest that was tested."),
    ],
)
def test_an_old_transformer_engine_is_refused_and_a_newer_one_mentioned_once(
    version: str, said: str, tmp_path: Path
) -> None:
    code = """
import torch
torch.cuda.is_available = lambda: True
from megatron_iwsft.distributed.context import prepare
from megatron_iwsft.errors import ConfigError
try:
    print("ready", prepare("cuda") and prepare("cuda"))
except ConfigError as error:
    print(error)
"""
    done = run_python("-c", code, **engine_of(version, tmp_path))
    lines = (done.stdout + done.stderr).splitlines()
    ready = ["ready True"] if version[0] == "2" else []
    assert [line for line in lines if line.startswith("ready")] == ready
    mentions = [line for line in lines if "Transformer Engine" in line]
    assert len(mentions) == bool(said) and said in "".join(mentions)
    assert all(len(line) < 200 for line in mentions)


def test_the_versions_of_transformer_engine_are_everywhere_the_same() -> None:
    (extra,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert extra == f"transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}"
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert f"must be {OLDEST_TRANSFORMER_ENGINE} or newer; {TESTED_TRANSFORMER_ENGINE} is" in text


@te
def test_the_newest_version_that_was_tested_is_the_one_that_tests_run_with() -> None:
    assert untested_transformer_engine() is None


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


def refused_by_the_engine(platform, capability: tuple[int, int], cuda: str) -> dict[str, str | None]:
    """What is said against each recipe on a GPU of this capability, with this CUDA."""
    with (
        as_on_hopper(),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *args: capability),
        mock.patch("transformer_engine.pytorch.quantization.get_device_compute_capability", lambda: capability),
        mock.patch.object(torch.version, "cuda", cuda),
    ):
        return {recipe: fp8_refusal(recipe) for recipe in FP8_RECIPES if recipe != "mxfp8" or capability >= (10, 0)}


@te
def test_what_transformer_engine_does_not_support_is_refused_before_a_run() -> None:
    """It would end in a traceback at the first matmul."""
    from megatron_iwsft.testing import run_distributed

    fine = {"delayed": None, "tensorwise": None}
    (old_cuda,) = run_distributed(refused_by_the_engine, 1, (9, 0), "12.8")
    assert "CUDA >= 12.9" in old_cuda.pop("blockwise") and old_cuda == fine
    (consumer,) = run_distributed(refused_by_the_engine, 1, (12, 0), "13.0")
    assert "12.0+ architectures" in consumer.pop("mxfp8") and consumer == fine | {"blockwise": None}


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
