"""Import from and export to Hugging Face: log-probs equal those of `transformers`, tensors are equal bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from tests.support import tiny
from tests.support.jobs import result, run_each

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
GEMMA3 = dict(
    family="gemma3_text",
    head_dim=16,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=24,
    sliding_window=24,
    tie_word_embeddings=True,
    vocab_size=257,
)
MODELS = {  # every prompt is longer than the original context of a scaled rope, and than a sliding window
    "qwen2": dict(family="qwen2", rope_theta=1e6),
    "qwen2-tied": dict(family="qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2-yarn": dict(family="qwen2", rope_scaling=YARN),
    "qwen2-windows": dict(family="qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=2),
    "llama": dict(family="llama", num_key_value_heads=8),
    "llama-head-size": dict(family="llama", head_dim=16, vocab_size=257, tie_word_embeddings=True),
    "llama-3": dict(family="llama", rope_scaling=LLAMA3, rope_theta=5e5),
    "llama-linear": dict(family="llama", rope_scaling=dict(type="linear", factor=4.0), max_position_embeddings=32),
    "llama-dynamic": dict(family="llama", rope_scaling=dict(type="dynamic", factor=4.0)),
    "mistral": dict(family="mistral", sliding_window=24, head_dim=16),
    "qwen3": dict(family="qwen3", head_dim=16),
    "qwen3-yarn": dict(
        family="qwen3", head_dim=16, num_key_value_heads=1, rope_scaling=YARN | dict(attention_factor=1.2)
    ),
    "qwen3-moe": dict(family="qwen3_moe", head_dim=16, norm_topk_prob=True, **MOE),
    "qwen3-moe-plain": dict(family="qwen3_moe", norm_topk_prob=False, tie_word_embeddings=True, **MOE),
    "qwen3-moe-windows": dict(
        family="qwen3_moe", norm_topk_prob=True, use_sliding_window=True, sliding_window=24, **MOE
    ),
    "smollm3": dict(family="smollm3", pad_token_id=0, no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3-windows": dict(
        family="smollm3",
        pad_token_id=0,
        no_rope_layers=[0, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=24,
        tie_word_embeddings=False,
    ),
    "phi3": dict(family="phi3", pad_token_id=0, sliding_window=24),
    "phi3-partial": dict(family="phi3", pad_token_id=0, num_key_value_heads=2, partial_rotary_factor=0.5),
    "gemma3": GEMMA3 | dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3-linear": GEMMA3
    | dict(
        sliding_window_pattern=3, rope_theta=1e6, rope_local_base_freq=5e3, rope_scaling=dict(type="linear", factor=8.0)
    ),
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


def import_and_export(platform, directory: Path, layouts: list[dict], out: Path) -> dict[str, torch.Tensor]:
    """Import a model at each layout, save a checkpoint at out/LAYOUT, and export the running model to out/LAYOUT-running.

    Returns the log-probs of IDS at the layouts in which one process has a complete model.
    """
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights

    logprobs = {}
    source = SafetensorsDirectory(directory)
    for layout in layouts:
        if "expert" in layout and source.architecture.experts is None:
            continue
        parallel = platform.parallel(**layout, sequence="tensor" in layout)
        chunks = build_model(source.architecture, parallel, platform, ModelSettings())
        load_weights(chunks, source, parallel)
        name = "-".join(f"{k}{v}" for k, v in layout.items()) or "one"
        if parallel.pp.size() == 1 and parallel.ep.size() == 1:
            logprobs[name] = checkpoint_logprobs(chunks[0], IDS)
        writer = CheckpointWriter(out / name, source.architecture, layout=parallel.layout)
        writer.save(TrainState(chunks))
        export_running(chunks, parallel, out / f"{name}-running", writer.supporting_files(0), dtype=torch.float32)
    return logprobs


class RoundTrips:
    """The models of MODELS imported and exported at LAYOUTS, all of a number of processes in one job when first asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._outcomes = directory, {}

    def source(self, model: str) -> Path:
        """The Hugging Face directory that is imported."""
        path = self.directory / model
        return path if path.exists() else hf_directory(path, **MODELS[model])

    def __call__(self, model: str, world_size: int) -> tuple[dict[str, torch.Tensor], Path]:
        """`import_and_export`'s result and output directory."""
        out = self.directory / f"on-{world_size}"
        if world_size not in self._outcomes:
            cases = {name: (self.source(name), LAYOUTS[world_size], out / name) for name in MODELS}
            self._outcomes[world_size] = run_each(import_and_export, world_size, cases)
        return result(self._outcomes[world_size], model), out / model


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory: pytest.TempPathFactory) -> RoundTrips:
    return RoundTrips(tmp_path_factory.mktemp("round-trips"))


@pytest.mark.parallel
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "world_size",
    [
        pytest.param(1, marks=pytest.mark.numerics),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.exhaustive),
    ],
)
def test_logprobs_equal_transformers_and_the_round_trip_is_bit_exact(
    world_size: int, model: str, round_trips: RoundTrips, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file

    found, checkpoints = round_trips(model, world_size)
    directory = round_trips.source(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = hugging_face_logprobs(theirs, IDS)
    for layout, logprobs in found.items():
        assert (logprobs - expected).abs().max() <= 1e-4, layout

    original = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
    for source in sorted(checkpoints.iterdir()):
        running = source.name.endswith("-running")
        output = source if running else export_checkpoint(source, tmp_path / source.name)
        exported = load_file(output / "model.safetensors")
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[k], original[k]) for k in original), source.name
    again = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(hugging_face_logprobs(again, IDS), expected)


def test_an_export_is_sharded_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
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


def edit_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Edits the weight map of a directory's index."""

    def edit(directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return edit


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def first_file(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def swap_in_index(directory: Path) -> None:
    last = sorted(directory.glob("*.safetensors"))[-1].name
    edit_index(lambda weight_map: weight_map.update({"model.embed_tokens.weight": last}))(directory)


def store_twice(directory: Path) -> None:
    shutil.copy(first_file(directory), directory / "again.safetensors")
    edit_index(lambda weight_map: weight_map.update(other="again.safetensors"))(directory)


INDEX = "model.safetensors.index.json"
DAMAGED = {
    "a missing file": (lambda d: first_file(d).unlink(), r"model-00001-\S+ is missing"),
    "a truncated file": (
        lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-9]),
        "cannot be read as safetensors",
    ),
    "a path out of the directory": (
        write(INDEX, '{"weight_map": {"a": "../../x"}}'),
        "is not a plain file name",
    ),
    "an index that is a list": (write(INDEX, "[]"), r"index\.json is damaged"),
    "an index with a wrong file": (swap_in_index, "lists tensor .* in model-.*, which does not contain it"),
    "a tensor stored twice": (store_twice, "is in two files"),
    "no index": (lambda d: (d / INDEX).unlink(), "has neither model.safetensors nor"),
    "a wrong shape": (
        edit_config(intermediate_size=100),
        r"has shape \(96, 64\), but config.json implies \(100, 64\)",
    ),
    "a missing layer": (
        edit_config(num_hidden_layers=5, layer_types=None),
        "model.layers.4.input_layernorm.weight is missing",
    ),
    "a layer too many": (
        edit_config(num_hidden_layers=3, layer_types=None),
        "unexpected tensor .*, which a qwen2 model does not have",
    ),
    "an unknown family": (edit_config(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "an unknown rope": (
        edit_config(rope_parameters={"rope_type": "longrope"}),
        "rope type 'longrope' is not supported",
    ),
    "yarn without factor": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope type yarn needs factor"),
    "a factor that is text": (
        edit_config(rope_parameters={"rope_type": "linear", "factor": "4"}),
        "factor must be a number; found '4'",
    ),
    "too few layer types": (edit_config(layer_types=["full_attention"]), "layer_types must list 4 layers"),
    "an unknown layer type": (
        edit_config(layer_types=["chunked_attention"] * 4),
        "layer type 'chunked_attention' is not supported",
    ),
    "an unknown activation": (edit_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "a key that matters": (edit_config(attention_dropout=0.1), r"attention_dropout 0\.1 for qwen2 is not supported"),
    "a size that is text": (
        edit_config(hidden_size="64"),
        "hidden_size must be a positive integer; found '64'",
    ),
    "a config that is not JSON": (write("config.json", "{"), "is not valid JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("undamaged") / "hf")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_directory_is_rejected_with_the_reason(damage: str, undamaged: Path, tmp_path: Path) -> None:
    function, message = DAMAGED[damage]
    copy = Path(shutil.copytree(undamaged, tmp_path / "copy"))
    SafetensorsDirectory(copy)
    function(copy)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsDirectory(copy)


def test_vocabulary_padding_does_not_depend_on_the_layout() -> None:
    arch = Architecture.from_hf(tiny.model_config(vocab_size=32001), where="test")
    assert {arch.padded_vocab(tp) for tp in (1, 2, 4, 8)} == {32128}
