"""Training runs started from the command line under torchrun, for tests that stop, kill or starve them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from megatron_iwsft.testing import comparable_metrics
from tests.support import ROOT, command_environment, tiny, torchrun


def write_config(directory: Path, **sections: dict) -> Path:
    """The config of a small SFT run over a generated corpus, packed and sampled by quality, with `sections` merged into it."""
    if not (directory / "corpus").exists():
        tiny.token_corpus(directory, tiny.LENGTHS, scores=True)
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


class LaunchedRun:
    """A training run that was started from the command line. output: what a finished one has printed."""

    def __init__(self, config: Path, directory: Path, *overrides: str, **environment: str) -> None:
        self.directory = directory
        command = [sys.executable, *torchrun(2), "launch/train.py", "--config", str(config), f"run.dir={directory}"]
        self.process = subprocess.Popen(
            [*command, *overrides],
            cwd=ROOT,
            env=command_environment(**environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = ""

    def wait_until(self, condition: Callable[[], bool]) -> LaunchedRun:
        """Raises AssertionError with the run's output if it ends before the condition holds."""
        end = time.monotonic() + 240
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"the condition did not come to hold:\n{self.process.communicate()[0]}")
            time.sleep(0.05)
        return self

    def wait_for_steps(self, count: int) -> LaunchedRun:
        return self.wait_until(lambda: len(comparable_metrics(self.directory)) >= count)

    @property
    def workers(self) -> list[psutil.Process]:
        """The job's processes, by rank."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    @property
    def all_processes(self) -> list[psutil.Process]:
        """torchrun, the job's processes, and those that they have started."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it, the job's processes do not run. They keep their locks and their memory."""
        workers = self.workers
        for process in workers:
            process.suspend()
        try:
            yield
        finally:
            for process in workers:
                process.resume()

    def finish(self) -> int:
        """Wait for the end; returns the exit status."""
        try:
            self.output = self.process.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode
