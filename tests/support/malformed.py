"""Malformed configs and command lines: python -m tests.support.malformed [--fresh] runs each and prints what it said, as JSON lines.

Each runs in a fork of this process, which has imported nothing of the package but what the commands themselves import first; with
--fresh in a process of its own, and the slowest one's time is printed.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import ROOT

SHARD = ["tools/shard_corpus.py", "a", "--output", "b", "--tokenizer", "c"]
VALID = {
    "run": {"name": "r", "dir": "runs/r"},
    "model": {"hf": "/models/m"},
    "data": {"corpus": "c", "seq_length": 64, "epochs": 1},
}


def leaves(model: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a config."""
    out = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        out += leaves(inner, (*prefix, name)) if hasattr(inner, "model_fields") else [(*prefix, name)]
    return out


def cases(directory: Path) -> dict[str, tuple[list[str], str]]:
    """Name → (command line, what its message must hold)."""
    from megatron_iwsft.config.schema import Config

    valid = directory / "valid.yaml"
    valid.write_text(json.dumps(VALID))
    train = ["launch/train.py", "--config", str(valid)]
    out: dict[str, tuple[list[str], str]] = {}
    for path in leaves(Config):
        key = ".".join(path)
        out[f"{key} of the wrong type"] = ([*train, f"{key}={{a: [1, {{b: 2}}]}}"], key.rpartition(".")[0] or key)
        out[f"{key} misspelt"] = ([*train, f"{key}_=1"], f"{key}_ is not a known key")
        out[f"{key} as a section"] = ([*train, f"{key}=1", f"{key}.x=1"], key.rpartition(".")[2])
    out.pop(
        "model.config of the wrong type", None
    )  # any mapping may be a model's config, as far as this stage can tell
    texts = {
        "empty": ("", "must hold sections"),
        "a list": ("- run\n- model\n", "must hold sections"),
        "a number": ("42", "must hold sections"),
        "an open brace": ("run: {name: r", "is not valid YAML"),
        "a tab": ("run:\n\tname: r\n", "is not valid YAML"),
        "a key twice": ("run: {name: a, name: b, dir: d}", "stands twice"),
        "a Python object": ("run: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        "an alias to nothing": ("run: *nothing", "is not valid YAML"),
        "no run": (json.dumps({k: v for k, v in VALID.items() if k != "run"}), "run is missing"),
        "no model": (json.dumps({k: v for k, v in VALID.items() if k != "model"}), "model is missing"),
        "no data": (json.dumps({k: v for k, v in VALID.items() if k != "data"}), "data is missing"),
        "sections that are null": ("run: null\nmodel: null\ndata: null\n", "run must hold keys"),
    }
    for name, (text, message) in texts.items():
        path = directory / f"{name.replace(' ', '-')}.yaml"
        path.write_text(text)
        out[name] = (["launch/train.py", "--config", str(path)], message)
    binary = directory / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00run")
    lines = {
        "no config": (["launch/train.py"], "--config"),
        "no such config": (["launch/train.py", "--config", "/nowhere.yaml"], "cannot read the config"),
        "a directory as config": (["launch/train.py", "--config", str(directory)], "cannot read the config"),
        "not text": (["launch/train.py", "--config", str(binary)], "is not UTF-8"),
        "an unknown option": ([*train, "--fast"], "--fast"),
        "an override without a value": ([*train, "data.epochs"], "is not of the form section.key=value"),
        "an override without a key": ([*train, "=3"], "is not of the form section.key=value"),
        "an override that is not YAML": ([*train, "data.epochs=[1"], "is not valid YAML"),
        "reference without config": (["tools/precompute_reference.py"], "--config"),
        "convert without a command": (["tools/convert_hf.py"], "command"),
        "convert with an unknown command": (["tools/convert_hf.py", "transmogrify"], "transmogrify"),
        "shards of nothing": (["tools/shard_corpus.py"], "INPUT"),
        "an unknown dtype": (
            ["tools/convert_hf.py", "import", "--hf", "a", "--output", "b", "--dtype", "int4"],
            "int4",
        ),
        "sharding with a word for a number": (
            [*SHARD, "--max-tokens", "many"],
            "many",
        ),
        "bounds the wrong way round": (
            [*SHARD, "--min-tokens", "9", "--max-tokens", "3"],
            "min_tokens (9) is above max_tokens (3)",
        ),
        "scores from two places": (
            [*SHARD, "--answer-field", "a", "--wrong-answers", "score", "--score-field", "s"],
            "--wrong-answers score makes the score itself",
        ),
        "scored answers without an answer": (
            [*SHARD, "--wrong-answers", "score"],
            "needs the field of the reference answer",
        ),
        "a share that merges": ([*SHARD, "--task", "0/2", "--merge"], "not allowed with"),
        "no workers": ([*SHARD, "--workers", "0"], "must be a whole number above 0; found '0'"),
        "costs of no tokens": (
            ["tools/reference_costs.py", "--model", "m", "--tokens", "0", "--epochs", "1"],
            "must be a whole number above 0; found '0'",
        ),
        "inspecting nothing": (["tools/inspect_checkpoint.py"], "checkpoint"),
        "a report of nothing": (["tools/report.py"], "RUN_DIR"),
        "scoring without a model": (["tools/evaluate.py", "--corpus", "c"], "--model"),
    }
    return out | lines


def run_forked(command: list[str]) -> dict[str, Any]:
    """Status, output, and whether torch was imported, of a command in a fork of this process."""
    with tempfile.TemporaryFile() as captured:
        pid = os.fork()
        if pid == 0:
            os.dup2(captured.fileno(), 1)
            os.dup2(captured.fileno(), 2)
            sys.argv = command
            try:
                runpy.run_path(command[0], run_name="__main__")
                status = 0
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        captured.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "output": captured.read().decode()}


def run_fresh(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True)
    return {"status": done.returncode, "output": done.stdout + done.stderr}


def main() -> None:
    os.chdir(ROOT)
    fresh = "--fresh" in sys.argv
    slowest, count = 0.0, 0
    with tempfile.TemporaryDirectory() as directory:
        for name, (command, expected) in cases(Path(directory)).items():
            started = time.perf_counter()
            found = run_fresh(command) if fresh else run_forked(command)
            slowest, count = max(slowest, time.perf_counter() - started), count + 1
            torch = "torch" in sys.modules
            print(json.dumps({"name": name, "expected": expected, "torch": torch} | found), flush=True)
    if fresh:
        print(f"{count} malformed configs and command lines, the slowest ended after {slowest:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
