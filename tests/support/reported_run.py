"""A run directory that has everything that a report can show, written by the code that writes it in training as far as that goes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.metadata import Sources
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit, write_directory
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.objectives.breakdown import break_down
from megatron_iwsft.objectives.metrics import BY_GROUP, METRICS, WEIGHT_BINS
from megatron_iwsft.reference.sidecar import ReferenceIdentity, SidecarWriter
from megatron_iwsft.train.callbacks.events import Events
from tests.support import tiny

EVENTS = {
    "resumed": "resuming from checkpoints/step-00000040 after step 40",
    "skipped": "step 50 is skipped: loss nan, gradient norm nan.",
    "spike": "step 60: the loss is 9; the mean before was 1.5.",
    "rewind": "rewound to step 40; the batches of steps 58 to 60 are not trained on.",
    "finished": "finished 120 steps.",
}
STEPS = 120
SMALL = tiny.model_config(num_hidden_layers=1, vocab_size=300)


def groups() -> list[str]:
    """The names that a corpus with scores, sources and a mixture gives to groups of trajectories."""
    scores, sources = np.linspace(0.0, 1.0, 40), Sources.of(["math", "web"] * 20)
    found = break_down(scores, sources, {"own": 20, "s1k": 20})
    assert found is not None
    return found.names


def reported_run(directory: Path) -> Path:
    """The trajectories' weights need torch and transformers to be read; everything else is in small files."""
    (directory / "samples").mkdir(parents=True)
    tiny.write_jsonl(directory / "metrics.jsonl", [_metrics(step) for step in range(1, STEPS + 1)])
    record = Events(directory / "logs" / "events.jsonl")
    for event, text in EVENTS.items():
        record(event, text)
    sample = {"number": 1, "prompt": "What is 2 × 17?", "text": "34", "correct": True, "weight": 1.5}
    for step in (0, STEPS):
        tiny.write_jsonl(directory / "samples" / f"step-{step:08d}.jsonl", [sample | {"step": step}])
    corpus = tiny.token_corpus(directory / "data", tiny.LENGTHS[:8], scores=True)
    settings = {
        "run": {"name": directory.name, "seed": 1},
        "data": {"corpus": str(corpus.directory)},
        "objective": {"name": "iw_sft", "level": "trajectory", "temperature": 1.0, "clip": [0.0, 16.0]},
        "optimizer": {"lr": 1e-3},
    }
    (directory / "config.yaml").write_text(json.dumps(settings))
    write_reference(corpus)
    _write_export(directory / "hf" / f"step-{STEPS:08d}")
    return directory


def _metrics(step: int) -> dict:
    """Every metric of the table, and those by group that training and evaluation log."""
    wave = 1.0 + 0.2 * math.sin(step)
    row = {metric.name: wave for metric in METRICS} | {"step": step, "epoch": 0, "lr": 1e-3, "sequences": 8}
    row |= {"grad_norm": 10.0 ** (step % 4), "clip_fraction": 0.01 * wave, "peak_memory_bytes": 2e9}
    row["weight_histogram"] = [1.0 / (len(WEIGHT_BINS) + 1)] * (len(WEIGHT_BINS) + 1)
    row |= {f"nll/{group}": wave + 0.1 * i for i, group in enumerate(groups())}
    if step % 40 == 0:
        row |= {f"eval/held out/{metric.name}": wave for metric in METRICS if metric.evaluated and not metric.measured}
        row |= {f"eval/held out/{name}/{group}": wave for name in BY_GROUP for group in groups()}
    return row


def write_reference(corpus: Corpus) -> None:
    """Write a sidecar of a model that does not exist. Its log-probs are far from those of others, in both directions."""
    writer = SidecarWriter(corpus, ReferenceIdentity.of(corpus, weights="reference", dtype="fp32"))
    random = np.random.default_rng(0)
    with writer.lock():
        writer.prepare()
        writer.open()
        for i in range(len(corpus)):
            positions = np.flatnonzero(corpus.mask(i)[1:] == 1) + 1
            writer.write(i, positions, random.uniform(-9.0, -2.0, len(positions)).astype(np.float32))
        writer.flush()
        writer.finish({"model": "reference", "layout": "one process"})


def _write_export(directory: Path) -> None:
    architecture = Architecture.from_hf(SMALL, where="test")
    weights, sizes = RandomInit(architecture, seed=0), shapes(architecture)
    write_directory(
        directory,
        architecture,
        lambda name: weights.read(name, (0, 0, sizes[name][0])),
        names=list(sizes),
        dtype=torch.float32,
        finish=lambda partial: tiny.hf_tokenizer(partial, vocab_size=300),
    )
