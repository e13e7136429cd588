"""Import and export at several layouts, from a running model and from checkpoints; supporting files; parity with transformers."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_iwsft.checkpoint.info import INFO
from megatron_iwsft.cli import main as cli
from megatron_iwsft.convert.export import export_checkpoint, export_running
from megatron_iwsft.convert.import_hf import import_directory
from megatron_iwsft.convert.parity import _until, verify
from megatron_iwsft.errors import CheckpointError, DataError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import DTYPES
from megatron_iwsft.hf.model_card import Provenance, SupportingFiles
from megatron_iwsft.testing import run_distributed
from tests.convert.test_round_trip import edit_config, hf_directory
from tests.support import events, tiny
from tests.support.shared_runs import train_on
from tests.support.small_runs import small_run

LAYOUTS = {
    "tp2": dict(tensor=2),
    "pp2": dict(pipeline=2),
    "vp2": dict(pipeline=2, virtual_pipeline=2),
    "dp2": dict(),
}
PROVENANCE = Provenance(
    step=12,
    config={
        "run": {"name": "worked-sums"},
        "model": {"hf": "models/base", "checkpoint": None},
        "data": {"corpus": "corpora/sums"},
        "objective": {"name": "iw_sft", "level": "sequence", "clip": [0.0, 16.0], "proposal": {"kind": "current"}},
    },
    corpora={"sums": "c0ffee"},
)


def model_with_tokenizer(path: Path, **changes) -> Path:
    """A random model that stops only at <|endoftext|>, though its template ends turns with <|im_end|>."""
    hf_directory(path, **changes)
    tiny.hf_tokenizer(path, vocab_size=290)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 20}))
    return path


def export_while_running(platform, source: str, output: str) -> None:
    from megatron_iwsft.checkpoint.initial_weights import InitialWeights
    from megatron_iwsft.config.schema import Model
    from megatron_iwsft.model.gpt import ModelSettings, build_model

    weights = InitialWeights(Model(hf=source), seed=0)
    supporting_files = SupportingFiles(weights.tokenizer_files, PROVENANCE)
    for name, layout in LAYOUTS.items():
        parallel = platform.parallel(**layout)
        chunks = build_model(weights.architecture, parallel, platform, ModelSettings())
        weights.load(chunks, parallel)
        for dtype in ("fp32", "bf16"):
            target = Path(output) / f"{name}-{dtype}"
            for _ in range(2):  # the second export finds the first and leaves it unchanged
                export_running(chunks, parallel, target, supporting_files, dtype=DTYPES[dtype])


@pytest.mark.parallel
def test_a_running_model_is_exported_bit_for_bit(tmp_path: Path) -> None:
    source = model_with_tokenizer(tmp_path / "hf", vocab_size=297, num_key_value_heads=1)
    original = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    run_distributed(export_while_running, 2, str(source), str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{n}-{d}" for n in LAYOUTS for d in ("fp32", "bf16")
    )
    for directory in (tmp_path / "out").iterdir():
        dtype = DTYPES[directory.name.split("-")[1]]
        found = load_file(directory / "model.safetensors")
        assert found.keys() == original.keys()
        assert all(torch.equal(found[k], original[k].to(dtype)) for k in original), directory.name


@pytest.mark.parallel
def test_an_imported_checkpoint_is_exported_bit_for_bit(tmp_path: Path) -> None:
    source = model_with_tokenizer(tmp_path / "hf", vocab_size=297)
    written = import_directory(source, tmp_path / "ck", tensor=2)
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        import_directory(source, tmp_path / "ck", tensor=2)
    output = export_checkpoint(tmp_path / "ck", tmp_path / "out")
    same_tensors(output, source)
    assert {p.name for p in output.iterdir()} >= {"tokenizer.json", "generation_config.json", "README.md"}

    # Exporting a damaged checkpoint leaves no directory, not even a partial one.
    shards = sorted(written.glob("*.distcp"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-3000])
    with pytest.raises(CheckpointError, match=r"is truncated: .* bytes of"):
        export_checkpoint(written, tmp_path / "broken" / "hf")
    assert list((tmp_path / "broken").iterdir()) == []
    (written / INFO).unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export_checkpoint(written, tmp_path / "broken" / "hf")


def same_tensors(exported: Path, source: Path) -> None:
    found = load_file(exported / "model.safetensors")
    original = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    assert found.keys() == original.keys()
    assert [k for k in original if not torch.equal(found[k], original[k])] == []


@pytest.mark.parallel
def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    source = model_with_tokenizer(tmp_path / "hf")
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        import_directory(source, tmp_path / "ck")
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "`<img src=x onerror=alert(1)>`"),
        ("[a](http://b) **c**", "`[a](http://b) **c**`"),
        ("a\n# b\x1b[2J", "`a\\n# b\\x1b[2J`"),
        ("a``b`", "``` a``b` ```"),
        ("", "`  `"),
    ],
)
def test_a_model_card_shows_any_name_literally(name: str, shown: str, tmp_path: Path) -> None:
    architecture = Architecture.from_hf(tiny.model_config(), where="test")
    provenance = replace(PROVENANCE, config=PROVENANCE.config | {"run": {"name": name}})
    SupportingFiles([], provenance).write(tmp_path, architecture)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert f"# {shown}" in lines and f"- run: {shown}" in lines


def test_tokenizer_generation_config_and_model_card_are_exported(tmp_path: Path) -> None:
    import transformers

    source = model_with_tokenizer(tmp_path / "hf")
    architecture = Architecture.from_directory(source)
    files = [source / name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")]
    out = tmp_path / "out"
    out.mkdir()
    SupportingFiles(files, PROVENANCE).write(out, architecture)
    config = json.loads((out / "generation_config.json").read_text())
    end = transformers.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>")
    assert config == {"eos_token_id": [0, end], "top_k": 20}
    card = (out / "README.md").read_text()
    for fact in (
        "run: `worked-sums`",
        "step: `12`",
        "iw_sft (level sequence, clip [0.0, 16.0], proposal current)",
        "c0ffee",
        "models/base",
    ):
        assert fact in card

    # Without a generation config, one is created. Its end-of-turn token is that of the template.
    bare = tmp_path / "bare"
    bare.mkdir()
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|endoftext|>{% endfor %}"
    SupportingFiles(files[:2], PROVENANCE, chat_template=template).write(bare, architecture)
    assert json.loads((bare / "generation_config.json").read_text()) == {"eos_token_id": [end, 0]}
    assert transformers.AutoTokenizer.from_pretrained(bare).chat_template == template


@pytest.mark.slow
@pytest.mark.parallel
def test_verify_tests_beyond_the_context_and_finds_a_changed_weight(tmp_path: Path) -> None:
    source = model_with_tokenizer(tmp_path / "hf", max_position_embeddings=96)
    original = shutil.copytree(source, tmp_path / "original")
    import_directory(source, tmp_path / "ck")
    text = "What is 12 plus 30?"
    short, long = verify(source, tmp_path / "ck", text)
    with pytest.raises(DataError, match="at least 2 are needed"):
        verify(source, tmp_path / "ck", "a")
    seen: list[str] = []
    with pytest.raises(CheckpointError, match="no text was compared within 0 s"):
        verify(source, tmp_path / "ck", text, limit_s=0, report=seen.append)
    assert seen == [f"loading {source} in transformers"]
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] += 0.5
            save_file(tensors, file, metadata={"format": "pt"})
    (changed,) = verify(source, tmp_path / "ck", text, lengths=[50])
    assert short.tokens < 96 < long.tokens == 160
    for parity in (short, long):
        assert parity.max_difference <= 1e-4
    assert changed.tokens == 50
    assert changed.max_difference > 1e-3
    for parity in (short, long, changed):
        assert abs(parity.theirs - parity.ours) == pytest.approx(parity.max_difference)
    same_tensors(export_checkpoint(tmp_path / "ck", tmp_path / "out"), original)


def test_no_text_is_begun_after_the_deadline() -> None:
    seen: list[str] = []

    def slow(ids: list[int]) -> torch.Tensor:
        time.sleep(0.3)
        return torch.tensor(ids)

    found = _until(time.time() + 0.2, [[1], [2], [3]], slow, where="here", report=seen.append)
    assert [out.tolist() for out in found] == [[1]] and seen == ["here: 1 tokens (1 of 3)"]


@pytest.mark.parallel
def test_export_offers_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    train_on(2, small_run(tmp_path, "run", "checkpoint.every=2"))
    arguments = ["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    damaged = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = damaged.read_bytes()
    flipped = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    for damage in (flipped, content[: len(content) // 3]):
        damaged.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"The one before it is intact: use --checkpoint \S+/step-00000004$"):
            cli.run(arguments)
    cli.run([*arguments[:2], str(newest.with_name("step-00000004")), *arguments[3:]])
    assert (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"exists[^-]*$"):  # another mistake offers nothing
        cli.run([*arguments[:2], str(newest.with_name("step-00000004")), *arguments[3:]])


@pytest.mark.parallel
def test_keys_that_are_ignored_are_named_in_the_log_of_a_run(tmp_path: Path) -> None:
    edit_config(use_mrope=False)(hf_directory(tmp_path / "hf"))
    train_on(1, small_run(tmp_path, "run", f"model={{hf: {tmp_path}/hf}}", "data.max_steps=1"))
    named = [event["text"] for event in events(tmp_path / "run", "config keys ignored")]
    assert named == ["Ignored keys of config.json, which Qwen2ForCausalLM does not read: use_mrope."]
