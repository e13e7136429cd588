"""What tools/bench/attacks.py attacks: a small corpus, models, an adapter, a run, and the commands that read them."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = """
run: {{name: attacked, dir: {base}/new-run, seed: 3, device: cpu}}
model: {{hf: {base}/hf}}
data: {{corpus: {base}/corpus, seq_length: 256, global_batch_size: 2, epochs: 10, max_steps: 2}}
objective: {{name: sft}}
precision: {{dtype: fp32}}
evaluation: {{sets: [{{name: held-out, corpus: {base}/corpus}}], every: 1}}
"""
PROBLEM = {"number": 1, "prompt": "7?", "answer": "\\boxed{7}"}
ANSWERS = [
    {
        "format_version": 1,
        "model": "run/hf/step-00000002",
        "weights": "a",
        "settings": {"temperature": 1.0, "samples": 1},
    },
    PROBLEM | {"answers": [{"text": "7", "tokens": 1, "cut_off": False, "correct": True}]},
]
RESULT = {
    "step": 2,
    "weights": "a",
    "problems": 1,
    "samples": 1,
    "cut_off": 0,
    "pass@1": {"mean": 1.0, "low": 0.2, "high": 1.0},
}
SAMPLE = {
    "step": 2,
    "number": 1,
    "prompt": "7?",
    "expected": "7",
    "text": "7",
    "correct": True,
    "log_ratio": 0.1,
    "weight": 1.1,
}
MODEL = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def make_inputs(base: Path) -> None:
    """What is attacked: config.yaml, records.jsonl, benchmark.jsonl, tokenizer/, corpus/, hf/, adapter/, megatron/ and run/, which
    has a checkpoint, logs and answers.
    """
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()
    from megatron_iwsft.convert.export import export_checkpoint
    from megatron_iwsft.testing import run_distributed, worked_sums

    base.mkdir()
    corpus = worked_sums(base, 40)
    assert corpus == base / "corpus"
    run_distributed(_train, 1, base)
    export_checkpoint(base / "run", base / "hf")
    run_distributed(_write_as_megatron, 1, base)
    _write_adapter(base)
    answers = base / "run" / "evaluation" / "sums"
    for directory in (answers, base / "run" / "samples"):
        directory.mkdir(parents=True)
    (answers / "step-00000002.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ANSWERS))
    (answers / "step-00000002.json").write_text(json.dumps(RESULT))
    (base / "run" / "samples" / "step-00000002.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    (base / "benchmark.jsonl").write_text(json.dumps({"question": "7?", "answer": "#### 7"}) + "\n")
    (base / "config.yaml").write_text(CONFIG.format(base=base))


def _write_as_megatron(platform: Any, base: Path) -> None:
    """The exported model as Megatron-LM saves it."""
    from megatron.core import dist_checkpointing

    from megatron_iwsft.hf.directory import SafetensorsDirectory
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights

    parallel, weights = platform.parallel(), SafetensorsDirectory(base / "hf")
    (chunk,) = build_model(weights.architecture, parallel, platform, ModelSettings())
    load_weights([chunk], weights, parallel)
    (base / "megatron").mkdir()
    arguments = argparse.Namespace(num_attention_heads=2, rotary_base=10000, normalization="RMSNorm")
    state = {"args": arguments, "iteration": 2, "model": chunk.sharded_state_dict(metadata=None)}
    dist_checkpointing.save(state, str(base / "megatron"))


def _write_adapter(base: Path) -> None:
    import torch

    from megatron_iwsft.hf.adapter_mapping import adapter_shapes
    from megatron_iwsft.hf.adapters import AdapterSettings
    from megatron_iwsft.hf.directory import SafetensorsDirectory
    from megatron_iwsft.hf.peft import Description, write_adapter

    architecture = SafetensorsDirectory(base / "hf").architecture
    settings = AdapterSettings.of(architecture, rank=2, alpha=4.0, targets=None)
    shapes = adapter_shapes(architecture, settings)
    described = Description(settings, base="")
    write_adapter(
        base / "adapter", architecture, described, lambda name: torch.zeros(shapes[name]), dtype=torch.float32
    )


def _train(platform: Any, base: Path) -> None:
    from megatron_iwsft.config.loader import parse_config
    from megatron_iwsft.train.trainer import train

    text = CONFIG.format(base=base).replace("new-run", "run").replace(f"hf: {base}/hf", f"config: {json.dumps(MODEL)}")
    with contextlib.redirect_stdout(None):
        train(parse_config(text, [], where="attacks"))


def iwsft(*arguments: str) -> int | None:
    from megatron_iwsft.cli.main import run

    return run(list(arguments))


def config(base: Path) -> int | None:
    return iwsft("config", str(base / "config.yaml"))


def train(base: Path) -> None:
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.train.trainer import train

    train(load_config(str(base / "config.yaml"), []))


def resume(base: Path) -> None:
    """Continue the finished run for another step."""
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.train.trainer import train

    changes = [f"run.dir={base}/run", "data.max_steps=3", "model.hf=null", f"model.config={json.dumps(MODEL)}"]
    train(load_config(str(base / "config.yaml"), changes))


def reference(base: Path) -> None:
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.train.precompute import precompute_reference

    precompute_reference(load_config(str(base / "config.yaml"), ["objective.name=iw_sft"]))


def inspect_corpus(base: Path) -> int | None:
    return iwsft("inspect", str(base / "corpus"), "--verify")


def inspect_run(base: Path) -> int | None:
    return iwsft("inspect", str(base / "run"), "--verify")


def export(base: Path) -> int | None:
    return iwsft("export", "--checkpoint", str(base / "run"), "--output", str(base / "exported"))


def report(base: Path) -> int | None:
    return iwsft("report", str(base / "run"), "--output", str(base / "report.html"))


def shard(base: Path) -> int | None:
    tokenizer = str(base / "tokenizer")
    return iwsft("shard", str(base / "records.jsonl"), "--output", str(base / "new-corpus"), "--tokenizer", tokenizer)


def adapt(base: Path) -> None:
    """Train, starting from the adapter."""
    from megatron_iwsft.config.loader import load_config
    from megatron_iwsft.train.trainer import train

    adapter = json.dumps({"rank": 2, "alpha": 4.0, "init": str(base / "adapter")})
    train(load_config(str(base / "config.yaml"), [f"adapter={adapter}"]))


def read_megatron(base: Path) -> None:
    """What `iwsft import --megatron` reads, without the processes that it starts."""
    from megatron_iwsft.checkpoint.megatron import MegatronCheckpoint
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.mapping import shapes

    architecture = Architecture.from_directory(base / "hf")
    source = MegatronCheckpoint(base / "megatron", architecture)
    for name, shape in shapes(architecture).items():
        assert source.read(name, (0, 0, shape[0])).shape == shape


def generate(base: Path) -> int | None:
    return iwsft("generate", "--model", str(base / "hf"), "--max-new-tokens", "2", "--system", "Be brief.", "7?")


def evaluate(base: Path) -> int | None:
    options = ("--benchmark", str(base / "benchmark.jsonl"), "--output", str(base / "answers"), "--max-new-tokens", "2")
    return iwsft("evaluate", "--model", str(base / "hf"), *options)


TARGETS: dict[str, tuple[list[str], list[Callable[[Path], Any]]]] = {
    "config": (["config.yaml"], [config, train]),
    "corpus": (["corpus/*", "corpus/tokenizer/*"], [train, inspect_corpus, reference]),
    "manifest": (["corpus/manifest.json"], [train, inspect_corpus, reference, shard]),
    "tokenizer": (["tokenizer/*", "hf/tokenizer*"], [shard, train]),
    "records": (["records.jsonl"], [shard]),
    "Hugging Face": (["hf/config.json", "hf/*.safetensors", "hf/*.json"], [train, generate, evaluate]),
    "chat template": (["hf/tokenizer_config.json", "hf/chat_template.jinja"], [generate, evaluate]),
    "adapter": (["adapter/*.json", "adapter/*.safetensors"], [adapt]),
    "Megatron-LM": (["megatron/*", "megatron/.metadata"], [read_megatron]),
    "benchmark": (["benchmark.jsonl"], [evaluate]),
    "answers": (["run/evaluation/sums/*", "run/samples/*"], [report]),
    "checkpoint": (["run/checkpoints/step-*/*", "run/checkpoints/step-*/.metadata"], [export, inspect_run, resume]),
    "checkpoint info": (["run/checkpoints/latest", "run/checkpoints/step-*/iwsft.json"], [export, inspect_run, resume]),
    "logs": (["run/*.jsonl", "run/logs/*.jsonl", "run/config.yaml"], [report, resume, inspect_run]),
}
