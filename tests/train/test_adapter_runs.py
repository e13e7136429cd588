"""Training runs with adapters: the base as the reference, checkpoints of adapters alone, resumed runs, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.summary import describe
from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config, Model
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.hf.adapter_mapping import adapter_shapes
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.check import check
from tests.support import tiny
from tests.support.jobs import result, run_each
from tests.support.shared_runs import assert_same_checkpoints, copy_without_checkpoints_after

MODEL = tiny.model_config(num_hidden_layers=2, hidden_size=32, intermediate_size=48, tie_word_embeddings=True)
PP2 = "parallel={pipeline: 2}"
RUNS = {
    "base": [],
    "live": ["reference.source=live"],
    "cached": ["reference.source=cached"],
    "pp2": [PP2, "parallel.recompute=full"],
    "dropout": ["adapter.dropout=0.2"],
    "proposal": ["objective.proposal={kind: ema, decay: 0.5, update_every: 1}"],
}
# Continued after step 3 of 6: name → (of which run, what is changed).
RESUMED = {
    "resumed": ("base", []),
    "resumed-dropout": ("dropout", []),
    "resumed-proposal": ("proposal", []),
    "resumed-elsewhere": ("base", [PP2]),
}


def config(directory: Path, name: str, *overrides: str) -> Config:
    """Six steps of iw-SFT on adapters, at TP 2 with sequence parallelism."""
    text = f"""
run: {{name: {name}, dir: {directory}/{name}, seed: 7}}
model: {{config: {json.dumps(MODEL)}}}
data: {{corpus: {directory}/corpus, seq_length: 128, global_batch_size: 4, max_steps: 6}}
objective: {{name: iw_sft, temperature: 2.0}}
reference: {{source: base}}
adapter: {{rank: 4, alpha: 8.0}}
parallel: {{tensor: 2, sequence: true}}
precision: {{dtype: fp32}}
optimizer: {{lr: 3.0e-2, weight_decay: 0.1}}
checkpoint: {{every: 3, keep: 9}}
evaluation: {{sets: [{{name: held-out, corpus: {directory}/corpus}}], every: 2}}
"""
    return parse_config(text, list(overrides), where=name)


def run_one(platform: Any, directory: Path, name: str) -> None:
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    start, changes = RESUMED.get(name, (None, []))
    if start is not None and platform.rank == 0:
        copy_without_checkpoints_after(3, directory / start, directory / name)
    torch.distributed.barrier()
    settings = config(directory, name, *RUNS[start or name], *changes)
    if settings.reference.source == "cached":
        precompute_reference(settings)
    train(settings)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    tiny.token_corpus(directory, [30 + (i * 37) % 90 for i in range(20)])
    return directory


@pytest.fixture(scope="module")
def runs(directory: Path):
    """Name → the directory of a run, which has ended."""
    outcomes = run_each(run_one, 2, {name: (directory, name) for name in (*RUNS, *RESUMED)})

    def of(name: str) -> Path:
        result(outcomes, name)
        return directory / name

    return of


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", ["base", "live", "cached", "pp2", "dropout", "proposal"])
def test_weights_are_exactly_one_before_the_first_update(name: str, runs) -> None:
    at_start, first, *_, last = comparable_metrics(runs(name))
    assert at_start["eval/held-out/abs_log_ratio"] == 0
    assert first["abs_log_ratio"] == 0 and first["weight_max"] == first["weight_mean"] == 1
    assert last["weight_max"] > 1.01, "it moves"
    assert last["nll"] < first["nll"] and last["eval/held-out/nll"] < at_start["eval/held-out/nll"]


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("other", ["live", "cached"])
def test_the_base_is_the_reference_that_a_second_model_would_be(other: str, runs) -> None:
    """Bit for bit."""
    assert comparable_metrics(runs("base")) == comparable_metrics(runs(other))


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", [name for name in RESUMED if name != "resumed-elsewhere"])
def test_a_resumed_run_repeats_the_unbroken_one(name: str, runs) -> None:
    """Bit for bit."""
    start, _ = RESUMED[name]
    assert comparable_metrics(runs(name)) == comparable_metrics(runs(start))
    assert_same_checkpoints(runs(name), runs(start))


@pytest.mark.slow
@pytest.mark.parallel
def test_a_run_resumes_at_another_layout(runs) -> None:
    for here, there in zip(
        comparable_metrics(runs("base"))[1:], comparable_metrics(runs("resumed-elsewhere"))[1:], strict=True
    ):
        for key in ("loss", "nll", "grad_norm", "weight_max"):
            assert there[key] == pytest.approx(here[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", ["base", "pp2"])
def test_checkpoints_hold_adapters_and_nothing_of_the_base(name: str, runs) -> None:
    info = CheckpointInfo.read(runs(name))
    stored = FileSystemReader(str(info.directory)).read_metadata().state_dict_metadata
    sizes = {n: e.size.numel() for n, e in stored.items() if isinstance(e, TensorStorageMetadata)}
    assert sizes and all(".adapter." in n for n in sizes)
    assert info.adapters is not None and info.adapters.targets == ("qkv", "proj", "fc1", "fc2")
    expected = sum(torch.Size(s).numel() for s in adapter_shapes(info.architecture, info.adapters).values())
    assert sum(sizes.values()) == 4 * expected, "the adapters, AdamW's copy of them, and two moments"


@pytest.mark.slow
@pytest.mark.parallel
def test_inspect_names_the_adapters_and_their_base(runs) -> None:
    text, undamaged = describe(runs("base"), verify=True)
    assert undamaged and re.search(
        r"^adapters +rank 4, alpha 8, on qkv, proj, fc1, fc2; base [0-9a-f]{12}$", text, re.M
    )


@pytest.mark.slow
@pytest.mark.parallel
def test_adapters_cannot_be_taken_for_a_model(runs) -> None:
    with pytest.raises(CheckpointError, match=r"holds adapters, not a model's weights. Merge them"):
        InitialWeights(Model(checkpoint=str(runs("base"))), 0)


def continued_with_another_base(platform: Any, directory: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    from megatron_iwsft.train.trainer import train
    from tests.convert.test_round_trip import hf_directory

    model = hf_directory(directory / "hf", vocab_size=300)
    overrides = ["parallel={}", f"model={{hf: {model}}}", "evaluation={}", "data.max_steps=2", "reference.source=live"]
    train(config(directory, "on-hf", *overrides))
    found = []
    for change in (["adapter.rank=2"], ["adapter={}"], []):
        if not change:
            for file in model.glob("*.safetensors"):
                tensors = load_file(file)
                save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        try:
            train(config(directory, "on-hf", *overrides, *change))
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parallel
def test_another_base_or_other_adapters_are_refused_by_name(directory: Path) -> None:
    (found,) = run_distributed(continued_with_another_base, 1, directory)
    rank, none, base = found
    assert "adapter.rank is 2, but" in rank and "was trained with 4" in rank
    assert "adapter.rank is 0, but" in none and "was trained with 4" in none
    assert f"the base model {directory}/hf has changed since" in base and "its fingerprint is" in base


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.targets=[qkv, experts]"],
            r"adapter.targets has experts, which the qwen2 family does not have. It has qkv, ",
        ),
        (["adapter.rank=20"], r"adapter.rank is 20, but k_proj is 16 × 32: a rank above 16 adds nothing there"),
        (["adapter.targets=[]"], "adapter: targets must name layers"),
        (["adapter.targets=[gate]"], r"adapter.targets.0"),
        (["adapter={alpha: 3.0}", "reference.source=live"], "rank is 0, which means no adapters"),
        (["adapter={}"], "reference.source base is the model without its adapters, but adapter.rank is 0"),
        (["reference.model=elsewhere"], "source base is the policy without its adapters; leave model out"),
        (["reference={source: live, refresh: 2}"], "reference.refresh copies all weights"),
        (["precision={dtype: bf16, fp8: delayed}"], "base does not go with precision.fp8 delayed"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str, directory: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(directory, "mistake", *overrides), world_size=2)


def test_targets_are_by_family() -> None:
    dense = Architecture.from_hf(MODEL, where="test")
    changes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
    experts = Architecture.from_hf(tiny.model_config("qwen3_moe", **changes), where="test")
    assert AdapterSettings.of(dense, rank=2, alpha=1.0, targets=["fc2", "qkv"]).targets == ("qkv", "fc2")
    assert AdapterSettings.of(experts, rank=2, alpha=1.0, targets=None).targets == ("qkv", "proj")
    with pytest.raises(ConfigError, match="has fc1, which the qwen3_moe family does not have"):
        AdapterSettings.of(experts, rank=2, alpha=1.0, targets=["fc1"])
