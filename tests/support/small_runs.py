"""The config of a short SFT run on a generated corpus, for tests of the trainer's surroundings."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from tests.support import tiny


def small_run(directory: Path, name: str, *overrides: str) -> Config:
    """Five steps at data parallel 2 on directory/corpus, which is created if missing."""
    if not (directory / "corpus").exists():
        tiny.token_corpus(directory, [20 + (i * 37) % 70 for i in range(20)])
    model = tiny.model_config(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    text = f"""
run: {{name: {name}, dir: {directory}/{name}, seed: 5}}
model: {{config: {json.dumps(model)}}}
data: {{corpus: {directory}/corpus, seq_length: 96, global_batch_size: 4, max_steps: 5}}
objective: {{name: sft}}
precision: {{dtype: fp32}}
checkpoint: {{every: 0}}
"""
    return parse_config(text, list(overrides), where=name)
