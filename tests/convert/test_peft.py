"""Adapters to and from PEFT: log-probs in `peft` and here, merged models, adapters that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_iwsft.config.schema import Config
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.convert.parity import checkpoint_logprobs
from megatron_iwsft.errors import CheckpointError, ConfigError
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.directory import SafetensorsDirectory
from megatron_iwsft.hf.peft import PeftDirectory
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.check import check
from tests.convert.test_round_trip import hf_directory
from tests.support import tiny
from tests.support.jobs import run_each
from tests.train.test_adapter_runs import config as run_config

SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=300)
FAMILIES = {
    "qwen2": dict(tie_word_embeddings=True),
    "phi3": dict(family="phi3", pad_token_id=0),  # projections that are fused in transformers
}
IDS = [(7 * i) % 291 + 3 for i in range(40)]
TOLERANCE = 1e-4


def config(directory: Path, name: str, *overrides: str) -> Config:
    """A short run on directory/NAME-hf at TP 2, which exports at its end."""
    base = ("evaluation={}", "data.max_steps=3", "export={at_end: true}", f"model={{hf: {directory}/{name}-hf}}")
    return run_config(directory, name, *base, *overrides)


def train_one(platform: Any, settings: Config) -> None:
    from megatron_iwsft.train.trainer import train

    train(settings)


def our_logprobs(platform: Any, base: Path, adapter: Path, settings: AdapterSettings) -> Tensor:
    from megatron_iwsft.model.adapters import add_adapters
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_adapters, load_weights

    parallel, source = platform.parallel(), SafetensorsDirectory(base)
    chunks = build_model(source.architecture, parallel, platform, ModelSettings())
    load_weights(chunks, source, parallel)
    add_adapters(chunks, settings, parallel)
    load_adapters(chunks, settings, PeftDirectory(adapter, source.architecture, settings), parallel)
    return checkpoint_logprobs(chunks[0], IDS)


def peft_logprobs(base: Path, adapter: Path | None = None) -> Tensor:
    import transformers
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return hugging_face_logprobs(model.eval(), IDS)


def adapter_of_peft(base: Path, output: Path, names: list[str]) -> Path:
    """An adapter that PEFT has made, with random values."""
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family: NAME-hf, a run NAME on it, and theirs-NAME, an adapter by PEFT."""
    directory = tmp_path_factory.mktemp("peft")
    tiny.token_corpus(directory, [30 + (i * 37) % 90 for i in range(20)])
    for name, changes in FAMILIES.items():
        hf_directory(directory / f"{name}-hf", **SIZES, **changes)
    outcomes = run_each(train_one, 2, {name: (config(directory, name),) for name in FAMILIES})
    assert [str(error) for error in outcomes.values() if error is not None] == []
    return directory


def settings_of(directory: Path, name: str, targets: list | None = None) -> AdapterSettings:
    arch = SafetensorsDirectory(directory / f"{name}-hf").architecture
    return AdapterSettings.of(arch, rank=4, alpha=8.0, targets=targets)


@pytest.mark.parallel
@pytest.mark.numerics
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_what_was_trained(name: str, directory: Path) -> None:
    base, out = directory / f"{name}-hf", directory / f"{name}-peft"
    export_checkpoint(directory / name, out)
    ours = run_distributed(our_logprobs, 1, base, out, settings_of(directory, name))[0]
    theirs, before = peft_logprobs(base, out), peft_logprobs(base)
    assert (theirs - before).abs().max() > 0.05, "training has changed something"
    assert (ours - theirs).abs().max() <= TOLERANCE
    merged = export_checkpoint(directory / name, directory / f"{name}-merged", merge=True)
    assert (peft_logprobs(merged) - theirs).abs().max() <= TOLERANCE
    running = directory / name / "hf" / "step-00000003"
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (running / file).read_bytes() == (out / file).read_bytes()


@pytest.mark.parallel
@pytest.mark.numerics
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_peft_is_read(name: str, directory: Path) -> None:
    base = directory / f"{name}-hf"
    names = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "qwen2" else ["qkv_proj", "o_proj"]
    theirs = adapter_of_peft(base, directory / f"theirs-{name}", names)
    settings = settings_of(directory, name, ["qkv", "proj"])
    ours = run_distributed(our_logprobs, 1, base, theirs, settings)[0]
    assert (ours - peft_logprobs(base, theirs)).abs().max() <= TOLERANCE


def continued(platform: Any, directory: Path) -> str:
    """A run that starts from the adapters that another has exported; then on another base."""
    from megatron_iwsft.train.trainer import train

    adapter = f"adapter.init={directory}/qwen2/hf/step-00000003"
    settings = config(directory, "continued", adapter, "optimizer.lr=0", "parallel={}")
    settings = settings.model_copy(update={"model": config(directory, "qwen2").model})
    train(settings)
    try:
        other = hf_directory(directory / "other-hf", **SIZES, tie_word_embeddings=True, initializer_range=0.5)
        for file in other.glob("*.safetensors"):
            tensors = {n: t + 0.01 for n, t in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        train(config(directory, "other", adapter, "parallel={}"))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parallel
def test_a_run_continues_from_an_exported_adapter(directory: Path) -> None:
    (refusal,) = run_distributed(continued, 1, directory)
    first, second = (
        load_file(directory / run / "hf" / "step-00000003" / "adapter_model.safetensors")
        for run in ("qwen2", "continued")
    )
    assert all(torch.equal(first[name], second[name]) for name in first), "at learning rate 0"
    metrics = [json.loads(line) for line in (directory / "continued" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["abs_log_ratio"] > 1e-3, "the reference is the base"
    assert "belongs to another base than" in refusal and "the fingerprint of its base is" in refusal


@pytest.mark.parallel
def test_merging_into_another_base_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not the base of .* Name the directory of the right one with --base"):
        export_checkpoint(directory / "qwen2", directory / "out", merge=True, base=directory / "phi3-hf")
    moved = (directory / "qwen2-hf").rename(directory / "moved")
    try:
        export_checkpoint(directory / "qwen2", directory / "merged-elsewhere", merge=True, base=moved)
    finally:
        moved.rename(directory / "qwen2-hf")
    with pytest.raises(CheckpointError, match="--base is for --merge"):
        export_checkpoint(directory / "qwen2", directory / "out", base=moved)


def edited(**changes: Any):
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(change):
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda adapter: (adapter / "adapter_config.json").unlink(),
            "is not a PEFT adapter: it has no adapter_config.json",
        ),
        (edited(r=8), r"has r 8, but adapter.rank is 4. Set adapter.rank to the former"),
        (edited(lora_alpha=3), "has lora_alpha 3, but adapter.alpha is 8.0"),
        (edited(use_dora=True), "has use_dora True, which is not supported. Merge the adapter into its model"),
        (edited(rank_pattern={"q_proj": 8}), "has rank_pattern"),
        (edited(init_lora_weights="pissa"), "has init_lora_weights 'pissa'"),
        (edited(peft_type="IA3"), "has peft_type 'IA3'; only LORA is supported"),
        (tensors(lambda t: t.pop(FIRST)), f"has no tensor {FIRST}, which adapter.targets qkv, proj, fc1, fc2 implies"),
        (tensors(lambda t: t.update({FIRST: torch.zeros(4, 64)})), "it is an adapter of another base"),
        (tensors(lambda t: t.update({"x": torch.zeros(4)})), "has the tensor x, which is not among adapter.targets"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(edit, message: str, directory: Path, tmp_path: Path) -> None:
    adapter = export_checkpoint(directory / "qwen2", tmp_path / "adapter")
    settings = config(directory, "qwen2", f"adapter.init={adapter}")
    check(settings, world_size=2)
    edit(adapter)
    with pytest.raises(CheckpointError, match=message):
        check(settings, world_size=2)
