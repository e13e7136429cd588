"""Hugging Face directories in and out: log-probs as `transformers` computes them, tensors bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.convert.export import export_checkpoint, export_running
from megatron_iwsft.convert.parity import checkpoint_logprobs
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import SafetensorsDirectory
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs
from megatron_iwsft.testing import run_distributed
from tests.support import tiny

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
MODELS = {  # every prompt is longer than the original context of a scaled rope, and than a sliding window
    "qwen2": dict(family="qwen2", rope_theta=1e6),
    "qwen2-tied": dict(family="qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2-yarn": dict(family="qwen2", rope_scaling=YARN),
    "qwen2-windows": dict(family="qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=2),
    "llama": dict(family="llama", num_key_value_heads=8),
    "llama-head-size": dict(family="llama", head_dim=16, vocab_size=257, tie_word_embeddings=True),
    "llama-3": dict(family="llama", rope_scaling=LLAMA3, rope_theta=5e5),
    "llama-linear": dict(family="llama", rope_scaling=dict(type="linear", factor=4.0), max_position_embeddings=32),
    "mistral": dict(family="mistral", sliding_window=24, head_dim=16),
    "qwen3": dict(family="qwen3", head_dim=16),
    "qwen3-yarn": dict(
        family="qwen3", head_dim=16, num_key_value_heads=1, rope_scaling=YARN | dict(attention_factor=1.2)
    ),
    "qwen3-moe": dict(family="qwen3_moe", head_dim=16, norm_topk_prob=True, **MOE),
    "qwen3-moe-plain": dict(family="qwen3_moe", norm_topk_prob=False, tie_word_embeddings=True, **MOE),
}
LAYOUTS = {
    1: [dict()],
    2: [dict(tensor=2), dict(pipeline=2), dict(pipeline=2, virtual_pipeline=2), dict(expert=2)],
    4: [dict(tensor=4), dict(pipeline=4), dict(tensor=2, expert=2, pipeline=2)],
}
IDS = torch.randint(0, 257, (92,), generator=torch.Generator().manual_seed(1)).tolist()


def hf_directory(path: Path, **changes) -> Path:
    """A random-initialised `transformers` model, saved in several safetensors files."""
    import transformers

    config = tiny.model_config(**changes)
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        for name, parameter in model.named_parameters():  # biases and norms too: their defaults would hide a mix-up
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(path, max_shard_size="100KB")
    return path


def roundtrip(platform, directories: dict[str, str], layouts: list[dict], out: str):
    """Import each model at each layout; its log-probs where one process holds it, a checkpoint, and an export as it stands."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights

    found = {}
    for name, directory in directories.items():
        source = SafetensorsDirectory(directory)
        for layout in layouts:
            if "expert" in layout and source.architecture.experts is None:
                continue
            parallel = platform.parallel(**layout, sequence="tensor" in layout)
            chunks = build_model(source.architecture, parallel, platform, ModelSettings())
            load_weights(chunks, source, parallel)
            if parallel.pp.size() == 1 and parallel.ep.size() == 1:
                found[name, str(layout)] = checkpoint_logprobs(chunks[0], IDS)
            label = "-".join(f"{k}{v}" for k, v in layout.items()) or "one"
            root = Path(out) / f"{name}@{label}"
            writer = CheckpointWriter(root, source.architecture, layout=parallel.layout)
            writer.save(TrainState(chunks))
            export_running(chunks, parallel, Path(f"{root}-running"), writer.supporting_files(0), dtype=torch.float32)
    return found


@pytest.mark.parallel
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_logprobs_and_bit_exact_roundtrip(world_size: int, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    directories = {name: hf_directory(tmp_path / name, **changes) for name, changes in MODELS.items()}
    found = run_distributed(
        roundtrip, world_size, {k: str(v) for k, v in directories.items()}, LAYOUTS[world_size], str(tmp_path / "ck")
    )[0]
    for name, directory in directories.items():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            expected = hugging_face_logprobs(theirs, IDS)
        for (model, layout), logprobs in found.items():
            if model == name:
                assert (logprobs - expected).abs().max() <= 1e-4, (name, layout)
        original = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
        for source in sorted((tmp_path / "ck").glob(f"{name}@*")):
            running = source.name.endswith("-running")
            output = source if running else export_checkpoint(source, tmp_path / "out" / source.name)
            exported = load_file(output / "model.safetensors")
            assert exported.keys() == original.keys()
            assert all(torch.equal(exported[k], original[k]) for k in original), source.name
        again = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(hugging_face_logprobs(again, IDS), expected)


def test_export_is_sharded_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    from megatron_iwsft.hf.directory import write_directory

    source = SafetensorsDirectory(hf_directory(tmp_path / "in"))
    names = list(shapes(source.architecture))
    whole = {n: (0, 0, shape[0]) for n, shape in shapes(source.architecture).items()}
    read = lambda n: source.read(n, whole[n])  # noqa: E731
    write_directory(tmp_path / "out", source.architecture, read, names=names, dtype=torch.bfloat16, shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = SafetensorsDirectory(tmp_path / "out")
    assert all(torch.equal(again.read(n, whole[n]), read(n).bfloat16()) for n in names)

    def fails(name: str) -> torch.Tensor:
        if name == names[-1]:
            raise CheckpointError("damaged")
        return read(name)

    with pytest.raises(CheckpointError, match="damaged"):
        write_directory(tmp_path / "broken", source.architecture, fails, names=names, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="already exists"):
        write_directory(tmp_path / "out", source.architecture, read, names=names, dtype=torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_damaged_directories_are_refused_by_name(tmp_path: Path) -> None:
    good = hf_directory(tmp_path / "good")
    first = sorted(good.glob("*.safetensors"))[0].name

    def edit_index(directory: Path, change) -> None:
        index = directory / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    def swap_in_index(directory: Path) -> None:
        last = sorted(directory.glob("*.safetensors"))[-1].name
        edit_index(directory, lambda weight_map: weight_map.update({"model.embed_tokens.weight": last}))

    def add_to_index(directory: Path) -> None:
        edit_index(directory, lambda weight_map: weight_map.update(other="again.safetensors"))

    def edit_config(**changes):
        return lambda d: (d / "config.json").write_text(
            json.dumps(json.loads((d / "config.json").read_text()) | changes)
        )

    cases = [
        (lambda d: (d / first).unlink(), f"{first} is missing"),
        (lambda d: (d / first).write_bytes((d / first).read_bytes()[:-9]), "cannot be read as safetensors"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}'),
            "is not a plain file name",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), r"index\.json is damaged"),
        (swap_in_index, "lists tensor .* in model-.*, which does not contain it"),
        (lambda d: shutil.copy(d / first, d / "again.safetensors") and add_to_index(d), "is in two files"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
        (edit_config(intermediate_size=100), r"has shape \(96, 64\), but config.json implies \(100, 64\)"),
        (edit_config(num_hidden_layers=5, layer_types=None), "model.layers.4.input_layernorm.weight is missing"),
        (edit_config(num_hidden_layers=3, layer_types=None), "unexpected tensor .*, which a qwen2 model does not have"),
        (edit_config(model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (edit_config(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' is not supported"),
        (edit_config(rope_parameters={"rope_type": "yarn"}), "rope type yarn needs factor"),
        (edit_config(rope_parameters={"rope_type": "linear", "factor": "4"}), "factor must be a number; found '4'"),
        (edit_config(layer_types=["full_attention"]), "layer_types must list 4 layers"),
        (
            edit_config(layer_types=["chunked_attention"] * 4),
            "layer type 'chunked_attention' is not supported",
        ),
        (edit_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (edit_config(new_feature=1), "unsupported config key for qwen2: new_feature"),
        (edit_config(hidden_size="64"), "hidden_size must be a positive integer; found '64'"),
        (lambda d: (d / "config.json").write_text("{"), "is not valid JSON"),
        (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    ]
    for damage, message in cases:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        damage(copy)
        with pytest.raises(CheckpointError, match=message):
            SafetensorsDirectory(copy)


def test_vocabulary_padding_does_not_depend_on_the_layout() -> None:
    arch = Architecture.from_hf(tiny.model_config(vocab_size=32001), where="test")
    assert {arch.padded_vocab(tp) for tp in (1, 2, 4, 8)} == {32128}
