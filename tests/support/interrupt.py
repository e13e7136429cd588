"""Training runs of two processes under torchrun, for tests that interrupt them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from megatron_iwsft.testing import comparable_metrics as metrics
from tests.support import ROOT, tiny


def write_config(directory: Path, scores: list[float] | None = None, **sections: dict) -> Path:
    """A small run over a generated corpus, packed, drawn by quality; `sections` are merged into its config."""
    if not (directory / "corpus").exists():
        tiny.token_corpus(directory, [30 + (i * 37) % 90 for i in range(40)], scores=scores or True)
    config: dict[str, dict] = {
        "run": {"name": "interrupted", "dir": str(directory / "run"), "seed": 7, "device": "cpu"},
        "model": {"config": tiny.model_config(num_hidden_layers=2, tie_word_embeddings=True)},
        "data": {"corpus": str(directory / "corpus"), "seq_length": 128, "global_batch_size": 4, "epochs": 100}
        | {"max_steps": 40, "quality": {"mode": "sample"}},
        "objective": {"name": "sft"},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 3.0e-3, "weight_decay": 0.1},
        "checkpoint": {"every": 10},
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Run:
    """A run started from the command line. output: of a finished one."""

    def __init__(
        self, config: Path, directory: Path, *overrides: str, processes: int = 2, env: dict[str, str] | None = None
    ) -> None:
        self.directory = directory
        command = [
            sys.executable,
            "-m",
            "megatron_iwsft.distributed.torchrun",
            "--nproc_per_node",
            str(processes),
            "launch/train.py",
        ]
        self.process = subprocess.Popen(
            [*command, "--config", str(config), f"run.dir={directory}", *overrides],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = ""

    def until(self, condition: Callable[[], bool]) -> Run:
        end = time.monotonic() + 240
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the run did not get there:\n{self.process.communicate()[0]}")
            time.sleep(0.05)
        return self

    def steps(self, count: int) -> Run:
        return self.until(lambda: len(metrics(self.directory)) >= count)

    @property
    def workers(self) -> list[psutil.Process]:
        """By rank."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def finish(self) -> int:
        """The exit status."""
        try:
            self.output = self.process.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "logs" / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
