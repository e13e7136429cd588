"""Kill a training run repeatedly and check that nothing is lost: python tools/bench/faults.py [--kills 50] [--output DIR]

Two processes under torchrun train a small model with packing and quality sampling and save every few steps, asynchronously in every
other start. At random moments, half of them during a save, one or all ranks get SIGKILL. After every `--damage`-th kill, a file of the
newest checkpoint is truncated, changed in one bit or removed. The run must always resume from the newest complete checkpoint, and its
final metrics must equal those of an unbroken run bit for bit. Prints counts; exits with status 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from megatron_iwsft.utils.cli import run_command
from megatron_iwsft.utils.files import PARTIAL

ROOT = Path(__file__).resolve().parents[2]
MARK = "IWSFT_FAULTS"
DAMAGED = "damaged-by-the-sweep"  # a file that marks a damaged checkpoint
CONFIG = """
run: {{name: faults, dir: {directory}/unbroken, seed: 3, device: cpu, hang_timeout_s: 120}}
model:
  config: {{model_type: qwen2, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4,
            num_key_value_heads: 2, vocab_size: 400, max_position_embeddings: 512, tie_word_embeddings: true}}
data: {{corpus: {directory}/corpus, seq_length: 256, global_batch_size: 4, epochs: 1000, max_steps: {steps},
        quality: {{mode: sample}}}}
objective: {{name: sft}}
precision: {{dtype: fp32}}
optimizer: {{lr: 1.0e-3, weight_decay: 0.1}}
checkpoint: {{every: 8, keep: 3}}
logging: {{every: 1000}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="steps per run; a new run starts when it ends")
    parser.add_argument("--damage", type=int, default=5, help="damage the newest checkpoint after every N kills")
    parser.add_argument("--output", type=Path, default=Path("runs/faults"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sweep = Sweep(args.output, args.steps, args.damage, random.Random(args.seed))
    sweep.prepare()
    while sweep.figures["kills"] < args.kills:
        sweep.run(args.kills)
    print(json.dumps(sweep.figures, indent=1))
    wrong = (
        "lost steps",
        "processes left behind",
        "damaged checkpoints accepted",
        "damaged files not named",
        "runs unlike the unbroken one",
        "failed starts",
    )
    return int(any(sweep.figures[name] for name in wrong))


class Sweep:
    """Runs that are killed and resumed. figures: counts by name."""

    def __init__(self, directory: Path, steps: int, damage: int, chance: random.Random) -> None:
        self.directory, self.steps, self.damage_every, self.chance = directory.resolve(), steps, damage, chance
        self.log = self.directory / "output.log"
        names = ("kills", "correct resumes", "lost steps", "damaged checkpoints accepted", "processes left behind")
        self.figures: Counter[str] = Counter(dict.fromkeys(names, 0))

    def prepare(self) -> None:
        """Create a corpus of worked sums and train the unbroken run."""
        from megatron_iwsft.testing import worked_sums

        worked_sums(self.directory, 300)
        self.config = self.directory / "config.yaml"
        self.config.write_text(CONFIG.format(directory=self.directory, steps=self.steps), encoding="utf-8")
        status, output = self._finish(self._start(self.directory / "unbroken", asynchronous=False))
        if status:
            raise SystemExit(f"the unbroken run failed:\n{output}")
        self.expected = metrics(self.directory / "unbroken")

    def run(self, kills: int) -> None:
        """Train one run to its end, with up to `kills` kills in total."""
        number = self.figures["runs"] = self.figures["runs"] + 1
        run = self.directory / f"broken-{number}"
        expected_step, damaged = 0, None
        while True:
            process = self._start(run, asynchronous=self.figures["kills"] % 2 == 1)
            if self.figures["kills"] < kills and self._wait_and_kill(process, run):
                output = self._finish(process)[1]
                self._check_resume(output, expected_step, damaged)
                self.figures["kills"] += 1
                damaged = self._damage(run) if self.figures["kills"] % self.damage_every == 0 else None
                expected_step = next((int(c.name.removeprefix("step-")) for c in complete(run)), 0)
                continue
            status, output = self._finish(process)
            self._check_resume(output, expected_step, damaged)
            if status:
                self.figures["failed starts"] += 1
                print(output)
                return
            same = metrics(run) == self.expected
            self.figures["runs like the unbroken one, bit for bit" if same else "runs unlike the unbroken one"] += 1
            return

    def _start(self, run: Path, *, asynchronous: bool) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "megatron_iwsft.distributed.torchrun",
            "--nproc_per_node",
            "2",
            "launch/train.py",
        ]
        overrides = [f"run.dir={run}", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", MARK: str(self.directory)}
        with open(self.log, "wb") as log:  # not a pipe: a process left behind would keep it open
            return subprocess.Popen(
                [*command, "--config", str(self.config.resolve()), *overrides],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _finish(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        status = process.wait()
        until = time.monotonic() + 15
        while marked(str(self.directory)) and time.monotonic() < until:  # they exit by themselves after a moment
            time.sleep(0.1)
        self.figures["processes left behind"] += len(marked(str(self.directory)))
        return status, self.log.read_text(errors="replace")

    def _wait_and_kill(self, process: subprocess.Popen[bytes], run: Path) -> bool:
        """Kill at a random moment after the first step; False if the run ended before that."""
        log = run / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        while not log.exists() or log.stat().st_mtime_ns == before:  # the first step writes to it
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        time.sleep(self.chance.uniform(0, 3))
        if self.chance.random() < 0.5:  # during a save
            until = time.monotonic() + 5
            while time.monotonic() < until and not saving(run):
                time.sleep(0.002)
            time.sleep(self.chance.uniform(0, 0.4))
        victims = children(process.pid)
        if process.poll() is not None or len(victims) < 2:
            return False
        self.figures["kills within a save"] += saving(run)
        chosen = victims if self.chance.random() < 1 / 3 else [self.chance.choice(victims)]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
        self.figures["kills of all ranks" if len(chosen) > 1 else "kills of one rank"] += 1
        return True

    def _damage(self, run: Path) -> Path | None:
        """Truncate, change or remove a file of the newest complete checkpoint, if there is an older one.

        A checkpoint that is damaged already is left alone: a second damaged file in it might not be checked.
        """
        found = complete(run)
        if len(found) < 2:
            return None
        path = self.chance.choice(sorted(p for p in found[0].rglob("*") if p.is_file() and p.stat().st_size))
        kind = self.chance.choice(["truncated", "bit-flipped", "removed"])
        data = bytearray(path.read_bytes())
        if kind == "removed":
            path.unlink()
        elif kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        else:
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
            path.write_bytes(data)
        self.figures[f"files {kind}"] += 1
        (found[0] / DAMAGED).touch()
        return path

    def _check_resume(self, output: str, expected: int, damaged: Path | None) -> None:
        found = re.search(r"resuming from (\S+) after step (\d+)", output)
        step = int(found[2]) if found else 0
        if damaged is not None:
            checkpoint = next(p for p in damaged.parents if p.name.startswith("step-"))
            accepted = found is not None and Path(found[1]).resolve() == checkpoint.resolve()
            self.figures["damaged checkpoints accepted"] += accepted
            # A directory without its info file does not count as a checkpoint, so its damage is not reported.
            named = damaged.name in output or not (checkpoint / "iwsft.json").exists()
            self.figures["damaged files named" if named else "damaged files not named"] += 1
            if not named:
                print(f"{damaged} is damaged, but was not reported:\n{output}", flush=True)
        if step == expected:
            self.figures["correct resumes"] += 1
        else:
            self.figures["lost steps"] += abs(expected - step)
            print(f"resumed after step {step} instead of {expected}:\n{output}")


def complete(run: Path) -> list[Path]:
    """Complete, undamaged checkpoints, newest first."""
    found = sorted((p.parent for p in run.glob("checkpoints/step-????????/iwsft.json")), reverse=True)
    return [c for c in found if not (c / DAMAGED).exists()]


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(run.glob(f"checkpoints/step-*{PARTIAL}"))


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def marked(mark: str) -> list[int]:
    """All processes that were started by the runs of this sweep, directly or indirectly."""
    out = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                out.append(int(path.parent.name))
        except OSError:
            continue
    return out


def metrics(run: Path) -> list[dict]:
    from megatron_iwsft.testing import comparable_metrics

    return comparable_metrics(run)


if __name__ == "__main__":
    run_command(main)
