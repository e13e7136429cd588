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
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack_mutations import MUTATIONS
from attack_targets import TARGETS, make_inputs

from megatron_iwsft.utils.cli import positive_int, run_command

LIMIT_S = 60  # for one command, on a machine that may be busy
LONGEST_OUTPUT = 100_000  # characters


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


if __name__ == "__main__":
    run_command(main)
