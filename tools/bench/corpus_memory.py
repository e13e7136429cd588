"""Start-up time and host memory of a node's ranks over large corpora: tools/bench/corpus_memory.py [--trajectories 10] [--ranks 1 8]

Writes a corpus of N million trajectories with real indices and metadata, and token files that take no space. Then starts the ranks of
a node, each a process of its own, and has all of them do what a training run does with a corpus before its first step, and at the
start of its second epoch; in the quality mode sample, also what a run does that resumes in its fourth epoch.

Memory is the proportional set size of all ranks together, sampled every 0.1 s, above what they take before they open it. No
model is built. Seconds are of the slowest rank, by the clock and of CPU time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import shard_name
from megatron_iwsft.data.indexed import write_index
from megatron_iwsft.data.manifest import FORMAT_VERSION, distribution, read_manifest, shard_files, write_manifest
from megatron_iwsft.train.sampling import loss_groups, make_sampler, open_mixture

_SHARD = 1_000_000  # trajectories
_SEQ_LENGTH = 22528
_SOURCES = [f"source-{k}" for k in range(12)]
_CONFIG = "{run: {name: r, dir: r}, model: {hf: m}, data: {corpus: DIRECTORY, seq_length: 22528, global_batch_size: 256, epochs: 5, MODE}}"
_PHASES = ["import", "open", "groups", "epoch 0", "epoch 1", "resume in epoch 3"]
_MODES = {"none": "quality: {mode: none}", "sample": "quality: {mode: sample}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=10, help="millions (default: 10)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8], help="of the node (default: 1 8)")
    parser.add_argument("--modes", nargs="+", choices=list(_MODES), default=list(_MODES), help="quality modes")
    parser.add_argument("--corpus", type=Path, help="keep the corpus in this directory, or use the one that is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = args.corpus or Path(directory) / "corpus"
        if not corpus.exists():  # in a process of its own: the threads that Arrow starts do not survive a fork
            writer = multiprocessing.get_context("fork").Process(
                target=write_corpus, args=(corpus, args.trajectories * 1_000_000)
            )
            writer.start()
            writer.join()
        for mode in args.modes:
            for ranks in args.ranks:
                _measure(corpus, ranks, mode)


def write_corpus(directory: Path, trajectories: int) -> None:
    """A corpus of reasoning traces whose token and mask files are holes."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [shard_name(k) for k in range(-(-trajectories // _SHARD))]
    for k, name in enumerate(names):
        n = min(_SHARD, trajectories - k * _SHARD)
        lengths = rng.lognormal(8.2, 0.8, n).astype(np.int32).clip(64, _SEQ_LENGTH)
        for prefix, dtype in (
            (directory / name, np.dtype(np.uint16)),
            (directory / f"{name}.mask", np.dtype(np.uint8)),
        ):
            write_index(prefix, lengths, dtype)
            with open(prefix.with_name(prefix.name + ".bin"), "wb") as file:
                file.truncate(int(lengths.sum(dtype=np.int64)) * dtype.itemsize)
        columns = {
            "id": pa.nulls(n, pa.string()),
            "score": pa.array(rng.random(n)),
            "num_tokens": pa.array(lengths),
            "num_trained": pa.array(np.maximum(lengths // 2, 1)),
            "turn_weights": pa.nulls(n, pa.list_(pa.float32())),
            "source": pa.array(rng.integers(0, len(_SOURCES), n)).cast(pa.int64()),
        }
        columns["source"] = pa.array(_SOURCES).take(columns["source"])
        pq.write_table(
            pa.table(columns), directory / f"{name}.meta.parquet", use_dictionary=["source"], row_group_size=1 << 16
        )
    write_manifest(
        directory,
        {
            "format_version": FORMAT_VERSION,
            "run": "bench",
            "tokenizer": {"fingerprint": "none", "vocab_size": 32000},
            "template": None,
            "settings": {"template": "none"},
            "counts": {"trajectories": trajectories, "tokens": 0, "trained_tokens": 0, "dropped": 0},
            "dropped": {},
            "lengths": distribution(np.ones(1)),
            "scores": None,
            "shards": [{"name": name} for name in names],
            "files": {file: "0" * 64 for name in names for file in shard_files(name)},
        },
    )


def _measure(corpus: Path, ranks: int, mode: str) -> None:
    """Run all ranks through the phases together, and print a line for each phase."""
    fork = multiprocessing.get_context("fork")  # what they import, they share
    pipes = [fork.Pipe() for _ in range(ranks)]
    node = [
        fork.Process(target=_rank, args=(corpus, mode, rank, ranks, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in node:
        process.start()
    memory = _Memory([process.pid for process in node if process.pid])
    base, start_s, start_cpu_s = 0, 0.0, 0.0
    for phase in _PHASES if mode == "sample" else _PHASES[:-1]:
        for parent, _ in pipes:
            parent.send(phase)
        found = [parent.recv() for parent, _ in pipes]
        held, peak = memory.take()
        seconds, cpu, (note, *_) = max(f[0] for f in found), max(f[1] for f in found), found[0][2:]
        if phase == "import":
            base = held
            print(f"{note} trajectories, {ranks} ranks, quality {mode}")
            continue
        if phase in ("open", "groups", "epoch 0"):
            start_s, start_cpu_s = start_s + seconds, start_cpu_s + cpu
        print(
            f"  {phase:<18} {seconds:6.1f} s ({cpu:6.1f} s of CPU)   held {(held - base) / 1e9:6.2f} GB, "
            f"peak {(peak - base) / 1e9:6.2f} GB   {note}",
            flush=True,
        )
    print(f"  start, in all      {start_s:6.1f} s ({start_cpu_s:6.1f} s of CPU)", flush=True)
    memory.stop()
    for process in node:
        process.kill()
        process.join()


class _Memory:
    """Samples the proportional set size of some processes, in bytes."""

    def __init__(self, pids: list[int]) -> None:
        self._pids, self._peak, self._stopped = pids, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        total = 0
        for pid in self._pids:
            with suppress(OSError):  # it has failed, which its missing line says
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) << 10
        return total

    def take(self) -> tuple[int, int]:
        """Now, and the peak since the last call."""
        now = self._now()
        peak, self._peak = max(now, self._peak), 0
        return now, peak

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _rank(directory: Path, mode: str, rank: int, ranks: int, pipe: Connection) -> None:
    """One rank: does the phases that the parent names."""
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    state = _State(
        parse_config(_CONFIG.replace("DIRECTORY", str(directory)).replace("MODE", _MODES[mode]), [], where="bench")
    )
    while True:
        phase = pipe.recv()
        begin, cpu_before = time.perf_counter(), time.process_time()
        note = state.do(phase)
        pipe.send((time.perf_counter() - begin, time.process_time() - cpu_before, note))


class _State:
    """What a rank holds of its corpora."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def do(self, phase: str) -> str:
        """One of _PHASES; returns a remark."""
        match phase.split():
            case ["import"]:
                return f"{read_manifest(Path(self.config.data.mixture[0].corpus))[0]['counts']['trajectories']:,}"
            case ["open"]:
                self.mixture = open_mixture(self.config)
                self.sampler = make_sampler(self.config, self.mixture)
                return ""
            case ["groups"]:
                self.groups = loss_groups(self.mixture)
                return "" if self.groups is None else f"{len(self.groups.names)} groups"
            case ["epoch", "0"]:
                return f"{self.sampler.total_steps(self.config.data.epochs, None):,} steps in 5 epochs; {self._first_step(0)}"
            case ["resume", *_]:
                self.sampler = make_sampler(self.config, self.mixture)
        return self._first_step(int(phase.split()[-1]))

    def _first_step(self, epoch: int) -> str:
        step = sum(self.sampler.steps_in(e) for e in range(epoch))
        return f"step {step:,} has {sum(map(len, self.sampler.packs_at(step))):,} trajectories"


if __name__ == "__main__":
    main()
