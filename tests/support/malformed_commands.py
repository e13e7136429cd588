"""Malformed configs and command lines: python -m tests.support.malformed_commands [--fresh] runs each and prints its output, as JSON lines.

Each runs in a fork of this process, which has imported only the config schema of the package. With --fresh each runs in a new process,
and the time of the slowest is printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import ROOT, run_python

SHARD = ["tools/shard_corpus.py", "a", "--output", "b", "--tokenizer", "c"]
VALID = {
    "run": {"name": "r", "dir": "runs/r"},
    "model": {"hf": "/models/m"},
    "data": {"corpus": "c", "seq_length": 64, "epochs": 1},
}


def leaves(model: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every plain field of a config."""
    out = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        out += leaves(inner, (*prefix, name)) if hasattr(inner, "model_fields") else [(*prefix, name)]
    return out


def cases(directory: Path) -> dict[str, tuple[list[str], str]]:
    """Name → (command line, a part of its message)."""
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
    out.pop("model.config of the wrong type", None)  # at this stage any mapping can be a model's config
    sets = "evaluation.sets=[{name: test, corpus: c}]"
    for name, (overrides, message) in {
        "the best of a metric that is not evaluated": (
            [sets, "checkpoint.best.metric=eval/tset/nll"],
            "checkpoint.best: metric eval/tset/nll is none that this run evaluates. Did you mean eval/test/nll?",
        ),
        "patience without a metric": ([sets, "run.stop_early={patience: 3}"], "run.stop_early.metric is missing"),
        "patience without an evaluation": (
            ["run.stop_early={metric: eval/test/nll, patience: 3}"],
            "run.stop_early: metric eval/test/nll needs evaluation.sets",
        ),
        "a profile beyond the end": (
            ["data.max_steps=5", "run.profile.steps=[2, 9]"],
            "ends at step 9, but the run ends at step 5 (data.max_steps)",
        ),
    }.items():
        out[name] = ([*train, *overrides], message)
    texts = {
        "empty": ("", "must be a mapping with sections"),
        "a list": ("- run\n- model\n", "must be a mapping with sections"),
        "a number": ("42", "must be a mapping with sections"),
        "an open brace": ("run: {name: r", "is not valid YAML"),
        "a tab": ("run:\n\tname: r\n", "is not valid YAML"),
        "a key twice": ("run: {name: a, name: b, dir: d}", "duplicate key"),
        "a Python object": ("run: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        "an alias to nothing": ("run: *nothing", "is not valid YAML"),
        "no run": (json.dumps({k: v for k, v in VALID.items() if k != "run"}), "run is missing"),
        "no model": (json.dumps({k: v for k, v in VALID.items() if k != "model"}), "model is missing"),
        "no data": (json.dumps({k: v for k, v in VALID.items() if k != "data"}), "data is missing"),
        "sections that are null": ("run: null\nmodel: null\ndata: null\n", "run must be a mapping with keys"),
    }
    for name, (text, message) in texts.items():
        path = directory / f"{name.replace(' ', '-')}.yaml"
        path.write_text(text)
        out[name] = (["launch/train.py", "--config", str(path)], message)
    binary = directory / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00run")
    lines = {
        "no config": (["launch/train.py"], "--config"),
        "no such config": (["launch/train.py", "--config", "/nowhere.yaml"], "cannot read config file"),
        "a directory as config": (["launch/train.py", "--config", str(directory)], "cannot read config file"),
        "not text": (["launch/train.py", "--config", str(binary)], "is not UTF-8"),
        "an unknown option": ([*train, "--fast"], "--fast"),
        "an override without a value": ([*train, "data.epochs"], "is not of the form section.key=value"),
        "an override without a key": ([*train, "=3"], "is not of the form section.key=value"),
        "an override that is not YAML": ([*train, "data.epochs=[1"], "is not valid YAML"),
        "reference without config": (["tools/precompute_reference.py"], "--config"),
        "convert without a command": (["tools/convert_hf.py"], "a command is missing: import, export, verify."),
        "convert with an unknown command": (["tools/convert_hf.py", "transmogrify"], "unknown command 'transmogrify'"),
        "convert with another command": (["tools/convert_hf.py", "train"], "unknown command 'train'"),
        "shards of nothing": (["tools/shard_corpus.py"], "INPUT"),
        "an unknown dtype": (
            ["tools/convert_hf.py", "import", "--model", "a", "--output", "b", "--dtype", "int4"],
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
        "a share that merges": ([*SHARD, "--share", "0/2", "--merge"], "not allowed with"),
        "no workers": ([*SHARD, "--workers", "0"], "must be an integer above 0; found '0'"),
        "costs of no tokens": (
            ["tools/reference_costs.py", "--model", "m", "--tokens", "0", "--epochs", "1"],
            "must be an integer above 0; found '0'",
        ),
        "inspecting nothing": (["tools/inspect_checkpoint.py"], "PATH"),
        "a report of nothing": (["tools/report.py"], "RUN_DIR"),
        "scoring without a model": (["tools/evaluate.py", "--corpus", "c"], "--model"),
    }
    return out | lines | iwsft_cases(directory)


def iwsft_cases(directory: Path) -> dict[str, tuple[list[str], str]]:
    """Mistakes in the command line of `iwsft` itself, and the missing arguments of each of its commands."""
    iwsft = ["-m", "megatron_iwsft"]
    corpus, checkpoint, neither = (str(directory / name) for name in ("a-corpus", "a-run", "neither"))
    for file in (f"{corpus}/manifest.json", f"{checkpoint}/checkpoints/latest", f"{neither}/notes.txt"):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    missing = {
        "shard": "INPUT, --output, --tokenizer",
        "inspect": "PATH",
        "reference": "--config",
        "train": "--config",
        "report": "RUN_DIR",
        "import": "--model, --output",
        "export": "--checkpoint, --output",
        "verify": "HF_DIR, CHECKPOINT",
        "evaluate": "--model",
        "generate": "--model",
        "layouts": "--model, --gpus, --seq-length, --global-batch-size",
        "reference-costs": "--model, --tokens, --epochs",
        "train-tokenizer": "INPUT, --output, --text-field",
        "make-arithmetic": "--output",
        "control": "--config",
    }
    out = {
        f"{name} without arguments": ([*iwsft, name], f"iwsft {name}: the following arguments are required: {names}.")
        for name, names in missing.items()
    }
    mistakes = {
        "a misspelt command": (["trian"], "unknown command 'trian'. Did you mean train?"),
        "an unknown command": (["xyzzy"], "unknown command 'xyzzy'. Commands: shard, inspect,"),
        "no command": ([], "a command is missing: shard, inspect,"),
        "an option before the command": (["--config", "c.yaml", "train"], "unknown command '--config'"),
        "an unknown option of doctor": (["doctor", "--fix"], "iwsft doctor: unknown arguments: --fix."),
        "an unknown option after overrides": (
            ["train", "--config", "c", "a=b", "--fast", "c=d"],
            "unknown arguments: --fast.",
        ),
        "an unknown field": (["config", "--field", "data.packng"], "'data.packng'. Did you mean data.packing?"),
        "a value without a config": (["config", "--get", "run.dir"], "--get needs a config file"),
        "an unknown value": (
            ["config", str(directory / "valid.yaml"), "--get", "run.dri"],
            "--get run.dri: unknown config field. Did you mean run.dir?",
        ),
        "null without values": (["config", "--null"], "--null goes with --get"),
        "two things of a config": (["config", "--field", "run", "--get", "run.dir"], "not allowed with"),
        "documentation of a file": (
            ["config", str(directory / "valid.yaml"), "--field", "run.dir"],
            "use --get run.dir",
        ),
        "a config that is not there": (["config", "/nowhere.yaml"], "cannot read config file"),
        "inspecting what does not exist": (["inspect", "/nowhere"], "/nowhere does not exist."),
        "inspecting a file": (["inspect", f"{neither}/notes.txt"], "is not a directory."),
        "inspecting another directory": (["inspect", neither], "is neither a corpus (no manifest.json, shard-*)"),
        "the config of a corpus": (["inspect", corpus, "--show-config"], "--show-config is for checkpoints and runs"),
        "packing of a checkpoint": (["inspect", checkpoint, "--seq-length", "9"], "--seq-length is for corpora"),
        "evaluating on nothing": (["evaluate", "--model", "m"], "give --benchmark, --corpus or --tasks"),
        "options for no harness": (["evaluate", "--model", "m", "--corpus", "c", "--fewshot", "3"], "--fewshot 3"),
        "k above the samples": (["evaluate", "--model", "m", "--benchmark", "b", "--k", "2"], "--samples, which is 1"),
        "samples without temperature": (
            ["evaluate", "--model", "m", "--benchmark", "b", "--samples", "2", "--temperature", "0"],
            "would give the same answer each time",
        ),
        "top-p of zero": (["evaluate", "--model", "m", "--benchmark", "b", "--top-p", "0"], "--top-p in (0, 1]"),
        "two benchmarks of one name": (
            ["evaluate", "--model", "m", "--benchmark", "a/b.jsonl", "c/b.jsonl"],
            "two benchmarks have the same file name",
        ),
        "verifying one token": (["verify", "a", "b", "--length", "1"], "--length must be at least 2"),
        "verifying on no text": (["verify", "a", "b", "--text", "/nowhere"], "text file /nowhere does not exist"),
        "a preset that is not there": (
            ["shard", *SHARD[1:], "--preset", "s2k"],
            "unknown preset 's2k'; known: s1k-1.1, openthoughts, openr1, preference.",
        ),
        "a share of what": (["shard", *SHARD[1:], "--share", "0"], "--share '0' is not of the form I/N"),
    }
    return out | {name: ([*iwsft, *arguments], message) for name, (arguments, message) in mistakes.items()}


class TorchImported:
    """An import hook that notes on standard error that torch is being imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch":
            os.write(2, b"torch was imported\n")


def run_forked(command: list[str]) -> dict[str, Any]:
    """Status and output of a command in a fork of this process, and whether it imported torch."""
    with tempfile.TemporaryFile() as captured:
        pid = os.fork()
        if pid == 0:
            os.dup2(captured.fileno(), 1)
            os.dup2(captured.fileno(), 2)
            sys.meta_path.insert(0, TorchImported())
            try:
                if command[0] == "-m":
                    sys.argv = command[1:]
                    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
                else:
                    sys.argv = command
                    runpy.run_path(command[0], run_name="__main__")
                status = 0
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        captured.seek(0)
        output = captured.read().decode()
        torch = "torch was imported" in output
        return {"status": os.waitstatus_to_exitcode(status), "output": output, "torch": torch}


def run_fresh(command: list[str]) -> dict[str, Any]:
    done = run_python(*command)
    return {"status": done.returncode, "output": done.stdout + done.stderr, "torch": False}


def main() -> None:
    os.chdir(ROOT)
    fresh = "--fresh" in sys.argv
    slowest, count = 0.0, 0
    with tempfile.TemporaryDirectory() as directory:
        for name, (command, expected) in cases(Path(directory)).items():
            started = time.perf_counter()
            found = run_fresh(command) if fresh else run_forked(command)
            slowest, count = max(slowest, time.perf_counter() - started), count + 1
            print(json.dumps({"name": name, "expected": expected} | found), flush=True)
    if fresh:
        print(f"{count} malformed configs and command lines, the slowest ended after {slowest:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
