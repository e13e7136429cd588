"""Damage files at random and check how commands take it: python tools/bench/attacks.py [--seconds 600] [--attacks N] [--seed S]

Each attack takes a fresh copy of a small corpus, checkpoint (also one of Megatron-LM), Hugging Face directory, adapter of PEFT, run with
answers, and config, changes one of their files (bytes flipped, cut, replaced, values of other types in JSON and in a checkpoint's
metadata, names that lead elsewhere, links, pipes, directories, pickles that run code) and starts a command that reads it. An attack is
held if the command ends within its time with status 0, or with a message and status 1 or 2, prints no escape sequence and not too much,
runs no code of the attacker, and changes no file outside its output. Prints, per kind of file, how many were tried and held, and each
failure with the seed that repeats it; exits with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.cli import positive_int, run_command

LIMIT_S = 60  # for one command, on a machine that may be busy
LONGEST_OUTPUT = 100_000  # characters
CODE_RAN = "code-ran"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive_int, default=600, help="stop after this long")
    parser.add_argument("--attacks", type=positive_int, default=10**9, help="stop after this many")
    parser.add_argument("--seed", type=int, default=0, help="of the first attack; attack i has seed S + i")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attacks-") as directory:
        home = Path(directory)
        # In a process of its own: this one must not start threads before it forks.
        maker = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(home / "pristine",))
        maker.start()
        maker.join()
        if maker.exitcode:
            return 1
        failures = sweep(home, args.seconds, args.attacks, args.seed)
    return 1 if failures else 0


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


# Attacks


def sweep(home: Path, seconds: float, attacks: int, first_seed: int) -> int:
    """Attack until the time or the number is up; returns how many attacks were not held."""
    import torch

    from megatron_iwsft.distributed import context

    torch.set_num_threads(1)
    context.prepare("cpu")  # what every attack needs, imported once
    for module in (
        *("train.trainer", "convert.export", "cli.inspect", "cli.report", "data.prepare.shard", "report.page"),
        *("evaluate.run", "evaluate.chat", "checkpoint.megatron", "hf.peft"),
    ):
        with contextlib.suppress(ImportError):
            __import__(f"megatron_iwsft.{module}")
    for module in ("math_verify", "transformers.generation", "transformers.models.qwen2.modeling_qwen2"):
        with contextlib.suppress(ImportError):
            __import__(module)

    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    until, seed = time.monotonic() + seconds, first_seed
    while time.monotonic() < until and seed - first_seed < attacks:
        kind, what, problem = attack(home, seed)
        tried[kind] += 1
        held[kind] += not problem
        if problem:
            print(f"seed {seed}: {kind}: {what}: {problem}", flush=True)
        seed += 1
    print(f"{'kind':<14}{'tried':>8}{'held':>8}")
    for kind in sorted(tried):
        print(f"{kind:<14}{tried[kind]:>8}{held[kind]:>8}")
    print(f"{'all':<14}{tried.total():>8}{held.total():>8}")
    return tried.total() - held.total()


def attack(home: Path, seed: int) -> tuple[str, str, str]:
    """One attack: (kind of file, what was done, problem or empty text)."""
    rng = random.Random(seed)
    base, sentinel = home / "base", home / "sentinel"
    for path in (base, sentinel):
        _remove(path)
    shutil.copytree(home / "pristine", base)
    _point_at(base, home / "pristine")
    sentinel.mkdir()
    (sentinel / "precious.txt").write_text("somebody else's file")
    kind = rng.choice(list(TARGETS))
    files, commands = TARGETS[kind]
    target = rng.choice(sorted(p for pattern in files for p in base.glob(pattern) if p.is_file()))
    what = f"{target.relative_to(base)}: {rng.choice(MUTATIONS)(target, rng, sentinel)}"
    command = rng.choice(commands)
    return kind, f"{what}; {command.__name__}", _run(home, base, sentinel, command)


def _point_at(base: Path, pristine: Path) -> None:
    """The config names files of the copy."""
    config = base / "config.yaml"
    config.write_text(config.read_text().replace(str(pristine), str(base)))


def _run(home: Path, base: Path, sentinel: Path, command: Callable[[Path], int | None]) -> str:
    """Run a command in a forked process; returns what was wrong, or empty text."""
    before, log = _state(sentinel), home / "log"
    child = os.fork()
    if child == 0:
        _become(base, log, command)
    end = time.monotonic() + LIMIT_S
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end after {LIMIT_S} s"
        time.sleep(0.005)
    code, output = os.waitstatus_to_exitcode(status[1]), log.read_text(errors="replace")
    if "Traceback" in output or code not in (0, 1, 2):
        return f"status {code}: {output.strip()[-400:]}"
    if code and not output.strip():
        return f"status {code} without a message"
    if "\x1b" in output or len(output) > LONGEST_OUTPUT:
        return f"an escape sequence, or too much, in {len(output):,} characters: {output[:400]!r}"
    if _state(sentinel) != before:
        return f"files outside changed: {sorted(p.name for p in sentinel.iterdir())}"
    if "OUTSIDE:" in output:
        return output[output.index("OUTSIDE:") :].splitlines()[0]
    return ""


def _become(base: Path, log: Path, command: Callable[[Path], int | None]) -> None:
    """In the forked process: run `command` with its output in `log`, and end."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    allowed = (str(base), "/dev/", "/proc/", tempfile.gettempdir() + "/tmp", "/dev/shm")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and str(arguments[1]).startswith(f"{tempfile.gettempdir()}/pymp-"):
            return  # multiprocessing's own, to the process that worker processes are forked from
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
            os.write(2, f"OUTSIDE: {event} {arguments!r:.200}\n".encode())
        elif event == "open" and isinstance(arguments[0], str) and _writes(arguments):
            path = os.path.realpath(arguments[0])
            if not path.startswith(allowed) and "__pycache__" not in path:
                os.write(2, f"OUTSIDE: open {path}\n".encode())

    sys.addaudithook(audit)
    os.chdir(base)
    try:
        run_command(lambda: command(base))
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return any(c in str(mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def _state(directory: Path) -> dict[str, Any]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in directory.iterdir()}


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


# Commands


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


# Mutations: each changes a file and says what it did


class _RunsCode:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.sentinel / CODE_RAN}",)


def flip(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = bytearray(path.read_bytes() or b" ")
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 5, 50]))]
    for place in places:
        content[place] = rng.randrange(256)
    path.write_bytes(content)
    return f"{len(places)} bytes changed"


def cut(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = path.read_bytes()
    at = rng.choice([0, 1, len(content) // 2, max(0, len(content) - 1), rng.randrange(len(content) + 1)])
    path.write_bytes(content[:at])
    return f"cut to {at} of {len(content)} bytes"


def extend(path: Path, rng: random.Random, sentinel: Path) -> str:
    tail = rng.choice([b"\0" * 100, b"\xff\xfe\x1b[2J", b"{" * 200_000, rng.randbytes(1000)])
    path.write_bytes(path.read_bytes() + tail)
    return f"{len(tail)} bytes appended"


def replace(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = rng.choice(
        [
            b"",
            b"\0" * 1000,
            b"[" * 100_000,
            b"null",
            b"[]",
            b"{}",
            b"\xff\xfe",
            b"%$\n" * 10,
            b"{'a': !!python/object:os.system}",
        ]
    )
    path.write_bytes(content)
    return f"replaced by {content[:20]!r}"


def run_code(path: Path, rng: random.Random, sentinel: Path) -> str:
    if zipfile.is_zipfile(path):
        import torch

        torch.save(_RunsCode(sentinel), path)
    else:
        path.write_bytes(pickle.dumps(_RunsCode(sentinel), protocol=rng.choice([0, 2, 4])))
    if rng.random() < 0.7:
        _relist(path)
    return "replaced by a pickle that runs code"


def irregular(path: Path, rng: random.Random, sentinel: Path) -> str:
    path.unlink()
    kind = rng.choice(["directory", "pipe", "link", "dangling link", "link to itself", "nothing"])
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link": sentinel / "precious.txt", "dangling link": "nowhere"}.get(kind, path))
    return f"a {kind}" if kind != "nothing" else "removed"


# fmt: off
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), [], {}, [[[]]], "", "a\0b", "../../sentinel/precious.txt",
    "x" * 100_000, "\x1b[2J", "{{ 1/0 }}", "{% for a in range(10**9) %}{% endfor %}",
]
# fmt: on


def change_json(path: Path, rng: random.Random, sentinel: Path) -> str:
    """Another value somewhere in a JSON document or a checkpoint's metadata; in other files, bytes."""
    if path.name == ".metadata":
        return change_metadata(path, rng, sentinel)
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return flip(path, rng, sentinel)
    places = list(_places(document))
    if not places:
        return replace(path, rng, sentinel)
    holder, key = rng.choice(places)
    value = rng.choice([*VALUES, str(sentinel / "precious.txt")])
    if rng.random() < 0.2:
        del holder[key]
        change = "removed"
    elif isinstance(holder, dict) and rng.random() < 0.2:
        holder[value if isinstance(value, str) else repr(value)] = holder.pop(key)
        change = f"renamed to {value!r:.40}"
    else:
        holder[key] = value
        change = f"= {value!r:.40}"
    path.write_text(json.dumps(document))
    if rng.random() < 0.5:
        _relist(path)
    return f"{key!r:.40} {change}"


def change_metadata(path: Path, rng: random.Random, sentinel: Path) -> str:
    """Another value of an attribute of an object in a checkpoint's metadata, or of one of its entries."""
    import torch

    metadata = pickle.loads(path.read_bytes())  # our own
    objects = [metadata, *metadata.state_dict_metadata.values(), *metadata.storage_data.values()]
    objects += [chunk for entry in objects for chunk in getattr(entry, "chunks", [])]
    entries = (metadata.state_dict_metadata, metadata.storage_data)
    holder = rng.choice([*(vars(found) for found in objects), *entries])
    key = rng.choice(list(holder))
    value = rng.choice(
        [*VALUES, str(sentinel / "precious.txt"), torch.Size((2**40, 2**40)), torch.Size((-1,)), *objects]
    )
    holder[key] = value
    path.write_bytes(pickle.dumps(metadata))
    if rng.random() < 0.7:
        _relist(path)
    return f"{key!r:.40} = {value!r:.40}"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value)


def _relist(path: Path) -> None:
    """Give a checkpoint the checksums of its files as they are now, as an attacker who knows the format would."""
    from megatron_iwsft.checkpoint.info import INFO, info_checksum
    from megatron_iwsft.checkpoint.integrity import file_sum

    for directory in (path.parent, path.parent.parent):
        file = directory / INFO
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            info = json.loads(file.read_text())
            info["files"] = (
                {name: file_sum(directory / name) for name in info["files"]} if path.name != INFO else info["files"]
            )
            info.pop("checksum", None)
            file.write_text(json.dumps(info | {"checksum": info_checksum(info)}))


MUTATIONS = [flip, flip, cut, extend, replace, run_code, irregular, change_json, change_json, change_json, change_json]


if __name__ == "__main__":
    run_command(main)
