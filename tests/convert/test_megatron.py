"""Checkpoints that Megatron-Core's writer makes under the names of Megatron-LM and Megatron-Bridge are imported bit for bit."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_iwsft.checkpoint.megatron import MegatronCheckpoint
from megatron_iwsft.checkpoint.pickles import read_metadata
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.convert.import_hf import import_directory
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import SafetensorsDirectory
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.testing import run_distributed
from tests.checkpoint.test_trust import Attack
from tests.convert.test_round_trip import MODELS, hf_directory
from tests.support import tiny

pytestmark = pytest.mark.parallel

LAYOUTS: dict[str, dict[str, int]] = {
    "qwen2": dict(tensor=2),
    "qwen3-moe": dict(pipeline=2),
    "gemma3": dict(tensor=2),
    "qwen2-tied": dict(pipeline=2),
}
NAMES = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Unknown:
    """Of a class that no reader needs, as Megatron-LM's arguments contain some."""

    def __init__(self) -> None:
        self.value = torch.ones(2)


def write_as_megatron(platform, source: str, out: str) -> None:
    """Write each model as Megatron-LM does: layers stacked, with arguments, an optimizer state and random states beside the weights."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights

    for name, layout in LAYOUTS.items():
        directory = Path(out) / name / "iter_0001000"
        weights = SafetensorsDirectory(Path(source) / name)
        parallel = platform.parallel(**layout)
        (chunk,) = build_model(weights.architecture, parallel, platform, ModelSettings())
        load_weights([chunk], weights, parallel)
        model: dict[str, Any] = chunk.sharded_state_dict(metadata=None)
        arch, prefix = weights.architecture, "model." if name == "qwen2-tied" else ""
        for entry in model.values():
            for ours, theirs in NAMES.items():
                entry.key = entry.key.replace(ours, theirs)
            entry.key = prefix + entry.key
        state = {
            "args": argparse.Namespace(
                num_attention_heads=arch.num_heads,
                num_query_groups=arch.num_groups,
                position_embedding_type="rope",
                rotary_base=int(arch.ropes[0].theta),
                use_rope_scaling=False,
                rotary_seq_len_interpolation_factor=None,
                apply_layernorm_1p=arch.zero_centered_norms,
                moe_router_topk=2,
                norm_epsilon=arch.norm_eps,
                normalization="RMSNorm",
                params_dtype=torch.float32,
                other=[Unknown()],
            ),
            "checkpoint_version": 3.0,
            "iteration": 1000,
            "model": model,
            "optimizer": ShardedTensor.from_rank_offsets(
                "optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(4), (0, platform.rank, 2)
            ),
            "rng_state": ShardedObject("rng_state", [{"states": Unknown()}], (2,), (platform.rank,)),
        }
        if platform.rank == 0:
            directory.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(directory))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Hugging Face directories, and below `megatron` a checkpoint of each."""
    home = tmp_path_factory.mktemp("megatron")
    for name in LAYOUTS:
        tiny.hf_tokenizer(hf_directory(home / name, **MODELS[name]), vocab_size=257)
    run_distributed(write_as_megatron, 2, str(home), str(home / "megatron"))
    return home


def iteration(home: Path, name: str) -> Path:
    return home / "megatron" / name / "iter_0001000"


def originals(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_read_bit_for_bit(name: str, written: Path) -> None:
    found = MegatronCheckpoint(iteration(written, name), Architecture.from_directory(written / name))
    for tensor, expected in originals(written / name).items():
        if tensor == "lm_head.weight" and found.architecture.tied:
            continue
        assert torch.equal(found.read(tensor, (0, 0, len(expected))), expected), tensor
        assert torch.equal(found.read(tensor, (0, 1, 3)), expected[1:3]), tensor


@pytest.mark.slow
def test_an_imported_checkpoint_is_the_model(written: Path, tmp_path: Path) -> None:
    for file in (written / "qwen2").glob("*"):  # only these files are needed
        if not file.name.startswith("model"):
            shutil.copy(file, tmp_path / file.name)
    import_directory(tmp_path, tmp_path / "ck", tensor=2, megatron=iteration(written, "qwen2"))
    exported = export_checkpoint(tmp_path / "ck", tmp_path / "out")
    found, expected = originals(exported), originals(written / "qwen2")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert (exported / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dict(num_hidden_layers=3, layer_types=["full_attention"] * 3), r"has 4 layers, but config.json has 3"),
        (dict(intermediate_size=160), r"linear_fc1.weight has shape \(.*config.json implies \(320, "),
        (
            dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
            r"--num-attention-heads 8, but config.json implies 4",
        ),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            r"--rotary-base 1000000, but config.json implies 500000",
        ),
        (
            dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3}),
            r"--use-rope-scaling False, but config.json implies True",
        ),
        (
            dict(model_type="llama"),
            r"unexpected tensor decoder.layers.self_attention.linear_qkv.bias, which a llama model",
        ),
        (dict(model_type="qwen3", head_dim=8), r"has no tensor decoder.layers.self_attention.q_layernorm.weight"),
    ],
)
def test_another_models_config_is_refused_by_name(edit: dict, message: str, written: Path, tmp_path: Path) -> None:
    config = json.loads((written / "qwen2" / "config.json").read_text()) | edit
    with pytest.raises(CheckpointError, match=message):
        MegatronCheckpoint(iteration(written, "qwen2"), Architecture.from_hf(config, where="test"))


def test_settings_that_megatron_bridge_saves_are_compared(written: Path, tmp_path: Path) -> None:
    """It writes objects as mappings with _target_."""
    copy = Path(shutil.copytree(iteration(written, "qwen3-moe"), tmp_path / "copy"))
    arch = Architecture.from_directory(written / "qwen3-moe")
    (copy / "run_config.yaml").write_text(
        "model:\n  _target_: megatron.bridge.models.Qwen3MoEModelProvider\n  activation_func: {_target_: silu, _call_: false}\n"
        f"  layernorm_epsilon: {arch.norm_eps}\n  num_query_groups: {arch.num_groups}\n  moe_router_topk: 1\n"
    )
    with pytest.raises(
        CheckpointError, match=r"has in run_config\.yaml model\.moe_router_topk 1, but config\.json impl"
    ):
        MegatronCheckpoint(copy, arch)
    for text in ("model: {rotary_base: null}", "model: 3", "- [", "\0"):  # nothing that contradicts
        (copy / "run_config.yaml").write_text(text)
        MegatronCheckpoint(copy, arch)


def test_megatron_lm_scales_rotary_positions_by_eight(written: Path, tmp_path: Path) -> None:
    """Its argument for another factor does not reach the model."""
    copy = Path(shutil.copytree(iteration(written, "qwen2"), tmp_path / "copy"))
    torch.save({"args": argparse.Namespace(use_rope_scaling=True, rope_scaling_factor=4.0)}, copy / "common.pt")
    config = json.loads((written / "qwen2" / "config.json").read_text())
    for factor in (8.0, 4.0):
        scaled = config | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, **LLAMA3, "factor": factor}}
        architecture = Architecture.from_hf(scaled, where="test")
        if factor == 8.0:
            MegatronCheckpoint(copy, architecture)
            continue
        with pytest.raises(CheckpointError, match=r"--rope-scaling-factor 8\.0, but config\.json implies 4"):
            MegatronCheckpoint(copy, architecture)


def test_the_last_iteration_of_a_run_is_taken(written: Path) -> None:
    run, arch = written / "megatron" / "qwen2", Architecture.from_directory(written / "qwen2")
    (run / "latest_checkpointed_iteration.txt").write_text("1000")
    assert MegatronCheckpoint(run, arch).directory == iteration(written, "qwen2")
    (run / "latest_checkpointed_iteration.txt").unlink()


def test_what_is_no_such_checkpoint_is_refused(written: Path, tmp_path: Path) -> None:
    arch = Architecture.from_directory(written / "qwen2")
    with pytest.raises(CheckpointError, match=r"has no \.metadata\. Name a run's checkpoint directory, or that of"):
        MegatronCheckpoint(written / "megatron" / "qwen2", arch)
    copy = Path(shutil.copytree(iteration(written, "qwen2"), tmp_path / "copy"))
    (copy / ".metadata").chmod(0o666)
    with pytest.raises(CheckpointError, match="can be written by every user"):
        MegatronCheckpoint(copy, arch)


def test_metadata_of_earlier_lines_of_megatron_core_is_read(written: Path, tmp_path: Path) -> None:
    """They kept the plans of all ranks in it, of a class that newer lines have for this purpose only."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlan

    copy = Path(shutil.copytree(iteration(written, "qwen2"), tmp_path / "copy"))
    metadata = read_metadata(copy)
    metadata.all_local_plans = [MCoreSavePlan()]  # type: ignore[attr-defined]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    MegatronCheckpoint(copy, Architecture.from_directory(written / "qwen2"))


def test_no_pickle_of_it_runs_code(written: Path, tmp_path: Path) -> None:
    arch = Architecture.from_directory(written / "qwen2")
    copy, ran = Path(shutil.copytree(iteration(written, "qwen2"), tmp_path / "copy")), tmp_path / "ran"
    torch.save({"args": argparse.Namespace(evil=Attack(ran), num_attention_heads=7)}, copy / "common.pt")
    with pytest.raises(CheckpointError, match="--num-attention-heads 7, but"):
        MegatronCheckpoint(copy, arch)
    torch.save({"args": Attack(ran)}, copy / "common.pt")
    MegatronCheckpoint(copy, arch)
    (copy / ".metadata").write_bytes(pickle.dumps(Attack(ran)))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        MegatronCheckpoint(copy, arch)
    assert not ran.exists()


def edited(checkpoint: Path, copy: Path, edit: Callable[[Any], Any]) -> Path:
    """A copy with other metadata."""
    shutil.copytree(checkpoint, copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    edit(metadata)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    return copy


def read_all(directory: Path, architecture: Architecture) -> None:
    source = MegatronCheckpoint(directory, architecture)
    for name, shape in shapes(architecture).items():
        source.read(name, (0, 0, shape[0]))


def set_everywhere(entries: str, **values: Any) -> Callable[[Any], Any]:
    return lambda metadata: [vars(entry).update(values) for entry in vars(metadata)[entries].values()]


def without_a_part(metadata: Any) -> None:
    entries = metadata.state_dict_metadata.values()
    entry = next(entry for entry in entries if len(getattr(entry, "chunks", ())) > 1)
    del entry.chunks[-1]


METADATA_ATTACKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a file elsewhere": (
        set_everywhere("storage_data", relative_path="../../pipe"),
        r"cannot be read: .*it is in '\.\./\.\./pipe', which is not a file of the checkpoint",
    ),
    "a FIFO": (set_everywhere("storage_data", relative_path="/dev/stdin"), "which is not a file of the checkpoint"),
    "a place of no type": (set_everywhere("storage_data", offset="a"), "damaged: its entry .* is of no checkpoint"),
    "a negative place": (set_everywhere("storage_data", length=-1), "damaged: its entry .* is of no checkpoint"),
    "a name of no type": (set_everywhere("storage_data", relative_path=b"a"), "is of no checkpoint"),
    "a part is missing": (without_a_part, "parts of tensor .* are missing"),
    "no parts": (set_everywhere("state_dict_metadata", chunks=[]), "parts of tensor .* are missing"),
    "parts of no type": (set_everywhere("state_dict_metadata", chunks=None), "is of no checkpoint"),
    "a huge size": (set_everywhere("state_dict_metadata", size=torch.Size((2**40, 2**40))), "is of no checkpoint"),
    "no size": (set_everywhere("state_dict_metadata", size=None), "is of no checkpoint"),
    "a negative size": (set_everywhere("state_dict_metadata", size=torch.Size((-1, -1))), "is of no checkpoint"),
    "no properties": (set_everywhere("state_dict_metadata", properties=3), "is of no checkpoint"),
    "no entries": (lambda metadata: vars(metadata).update(state_dict_metadata=None), "is of no checkpoint"),
    "no places": (lambda metadata: vars(metadata).update(storage_data=[1]), "is of no checkpoint"),
    "a terminal sequence": (
        lambda metadata: metadata.storage_data.update({"\x1b[2J": None}),
        r"its entry '\\x1b\[2J' is of no checkpoint",
    ),
}


@pytest.mark.parametrize("attack", METADATA_ATTACKS)
def test_malicious_metadata_is_refused(attack: str, written: Path, tmp_path: Path) -> None:
    edit, message = METADATA_ATTACKS[attack]
    architecture = Architecture.from_directory(written / "qwen2")
    copy = edited(iteration(written, "qwen2"), tmp_path / "copy", edit)
    with pytest.raises(CheckpointError, match=message):
        read_all(copy, architecture)


def test_arguments_of_any_size_are_compared(written: Path, tmp_path: Path) -> None:
    architecture = Architecture.from_directory(written / "qwen2")
    copy = Path(shutil.copytree(iteration(written, "qwen2"), tmp_path / "copy"))
    for value in (10**5000, "x" * 10**6, [1], float("nan")):
        torch.save({"args": argparse.Namespace(num_attention_heads=value)}, copy / "common.pt")
        try:
            MegatronCheckpoint(copy, architecture)
        except CheckpointError as error:
            assert len(str(error)) < 500
    archive = copy / "common.pt"
    with zipfile.ZipFile(archive) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in parts.items():
            bomb.writestr(name, content)
    MegatronCheckpoint(copy, architecture)
