"""Records → corpus directory: read lines, render and tokenize in worker processes, deduplicate and write in input order.

One process reads and writes; workers only turn lines into arrays. So the result does not depend on their number, and an
interrupted run continues after its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_iwsft.data import corpus as layout
from megatron_iwsft.data.indexed import token_dtype
from megatron_iwsft.data.records import Dropped, RecordFormat, RecordReader, Trajectory
from megatron_iwsft.data.templates import ChatTemplate
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError

_PROGRESS = ".progress.json"
_LINES_PER_TASK = 256


@dataclass(frozen=True)
class ShardSettings:
    """Everything that decides the content of a corpus, beside the input files."""

    tokenizer: str
    template: str | None = None
    record: RecordFormat = field(default_factory=RecordFormat)
    shard_tokens: int = 100_000_000


@dataclass(frozen=True)
class _Line:
    source: str  # file name
    number: int  # from 1
    content: bytes


@dataclass
class _Progress:
    """Where a run stands after its last finished shard."""

    run: str
    lines: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    dropped_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


def shard_corpus(
    inputs: list[Path], output: Path, settings: ShardSettings, *, workers: int = 1, show_progress: bool = True
) -> dict[str, Any]:
    """Make (or finish making) the corpus directory `output` from JSONL files; returns its manifest.

    Raises DataError for missing inputs, a tokenizer or template that does not serve, or an output that another run with other
    settings left unfinished. A finished corpus with the same inputs and settings is left as it is.
    """
    for path in inputs:
        if not path.is_file():
            raise DataError(f"input file {path} does not exist.")
    tokenizer = load_tokenizer(settings.tokenizer)
    template = ChatTemplate(tokenizer, settings.template) if _needs_template(inputs) else None
    described = {
        "template": settings.template or "tokenizer",
        "template_hash": template.hash if template else None,
        "record": asdict(settings.record),
        "shard_tokens": settings.shard_tokens,
    }
    run = _digest(
        {**described, "tokenizer": tokenizer.fingerprint, "inputs": [(p.name, layout.file_hash(p)) for p in inputs]}
    )

    manifest_path = output / layout.MANIFEST
    if manifest_path.exists():
        if json.loads(manifest_path.read_text(encoding="utf-8")).get("run") == run:
            return json.loads(manifest_path.read_text(encoding="utf-8"))
        raise DataError(
            f"{output} already holds a corpus made from other inputs or settings. Choose another --output, or remove it."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        progress = _resume(output, run)
        with (
            tqdm(
                total=sum(p.stat().st_size for p in inputs),
                unit="B",
                unit_scale=True,
                desc="sharding",
                disable=None if show_progress else True,  # None: only on a terminal
            ) as bar,
            _pool(workers, settings, with_template=template is not None) as mapper,
        ):
            lines = _lines(inputs, bar)
            writer = _OrderedWriter(output, progress, token_dtype(tokenizer.vocab_size), settings.shard_tokens)
            skipped = sum(1 for _ in islice(lines, progress.lines))
            if skipped < progress.lines:
                raise DataError(f"the inputs have become shorter since {output} was begun. Remove it and start again.")
            writer.consume(mapper(_tasks(lines)))
        tokenizer.copy_to(output / layout.TOKENIZER)
        if template is not None and settings.template is not None:
            (output / layout.TOKENIZER / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        manifest = _manifest(output, progress, run, described, tokenizer, template)
        layout.write_manifest(output, manifest)
        (output / _PROGRESS).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the corpus at {output}: {error.strerror} ({error.filename or output}). Nothing that is there counts as a "
            "corpus yet; mend it and run the same command to continue."
        ) from None
    return manifest


class _OrderedWriter:
    """Takes results in input order: drops duplicates, writes shards, and notes the position after each."""

    def __init__(self, output: Path, progress: _Progress, dtype: np.dtype, shard_tokens: int) -> None:
        self.output, self.progress, self.dtype, self.shard_tokens = output, progress, dtype, shard_tokens
        self.seen: set[bytes] = set()
        for shard in progress.shards:
            hashes = pq.read_table(output / f"{shard['name']}.meta.parquet", columns=["content_hash"])["content_hash"]
            self.seen.update(bytes.fromhex(h)[:16] for h in hashes.to_pylist())
        self.reasons = Counter(progress.reasons)
        self.dropped = open(output / layout.DROPPED, "ab")  # noqa: SIM115 - closed in consume()
        self.shard: layout.ShardWriter | None = None
        self.lines = progress.lines

    def consume(self, results: Iterable[list[tuple[_Line, list[Trajectory | Dropped]]]]) -> None:
        with self.dropped:
            for task in results:
                for line, outcomes in task:
                    self.lines += 1
                    for outcome in outcomes:
                        self._take(line, outcome)
                    if self.shard is not None and self.shard.num_tokens >= self.shard_tokens:
                        self._finish_shard()
            if self.shard is not None:
                self._finish_shard()
            self.dropped.flush()
            self.progress.reasons = dict(self.reasons)

    def _take(self, line: _Line, outcome: Trajectory | Dropped) -> None:
        if isinstance(outcome, Trajectory):
            key = bytes.fromhex(outcome.content_hash)[:16]
            if key in self.seen:
                outcome = Dropped("duplicate", outcome.content_hash)
            else:
                self.seen.add(key)
                if self.shard is None:
                    self.shard = layout.ShardWriter(self.output, len(self.progress.shards), self.dtype)
                self.shard.append(outcome, line.source, line.number)
                return
        self.reasons[outcome.reason] += 1
        entry = {"source": line.source, "line": line.number, "reason": outcome.reason}
        if outcome.detail:
            entry["detail"] = outcome.detail
        # Escaped: a detail may quote a lone surrogate, which UTF-8 cannot hold.
        self.dropped.write(json.dumps(entry).encode("ascii") + b"\n")

    def _finish_shard(self) -> None:
        assert self.shard is not None
        files = self.shard.close()
        self.dropped.flush()
        os.fsync(self.dropped.fileno())
        hashes = {name: layout.file_hash(self.output / name) for name in files}
        self.progress.shards.append({"name": self.shard.name, "files": hashes})
        self.progress.lines = self.lines
        self.progress.dropped_bytes = self.dropped.tell()
        self.progress.reasons = dict(self.reasons)
        _save_progress(self.output, self.progress)
        self.shard = None


def _resume(output: Path, run: str) -> _Progress:
    path = output / _PROGRESS
    if path.exists():
        progress = _Progress(**json.loads(path.read_text(encoding="utf-8")))
        if progress.run != run:
            raise DataError(f"{output} was begun from other inputs or settings. Choose another --output, or remove it.")
        os.truncate(output / layout.DROPPED, progress.dropped_bytes)
        return progress
    if any(output.iterdir()):
        unknown = sorted(p.name for p in output.iterdir())[:3]
        raise DataError(
            f"{output} is not empty and no corpus was begun there (it holds {', '.join(unknown)}). Choose another --output."
        )
    progress = _Progress(run=run)
    (output / layout.DROPPED).touch()
    _save_progress(output, progress)
    return progress


def _save_progress(output: Path, progress: _Progress) -> None:
    partial = output / f"{_PROGRESS}.partial"
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    os.replace(partial, output / _PROGRESS)


def _lines(inputs: list[Path], bar: tqdm) -> Iterator[_Line]:
    for path in inputs:
        with open(path, "rb") as file:
            for number, content in enumerate(file, 1):
                bar.update(len(content))
                if content.strip():
                    yield _Line(path.name, number, content)


def _tasks(lines: Iterator[_Line]) -> Iterator[list[_Line]]:
    while task := list(islice(lines, _LINES_PER_TASK)):
        yield task


def _needs_template(inputs: list[Path]) -> bool:
    """Whether any record has text to render: decided by the first line that parses, since a corpus is of one kind."""
    for path in inputs:
        with open(path, "rb") as file:
            for content in file:
                try:
                    record = json.loads(content)
                except ValueError:
                    continue
                return not (isinstance(record, dict) and "input_ids" in record)
    return True


@lru_cache(maxsize=1)
def _reader(settings: ShardSettings, with_template: bool) -> RecordReader:
    """This process's reader, opened at its first task."""
    tokenizer = load_tokenizer(settings.tokenizer)
    template = ChatTemplate(tokenizer, settings.template) if with_template else None
    return RecordReader(tokenizer, template, settings.record)


def _run_task(
    settings: ShardSettings, with_template: bool, lines: list[_Line]
) -> list[tuple[_Line, list[Trajectory | Dropped]]]:
    reader = _reader(settings, with_template)
    out = []
    for line in lines:
        stem = line.source.split(".", 1)[0]
        out.append((_Line(line.source, line.number, b""), list(reader.read(line.content, f"{stem}:{line.number}"))))
    return out


@contextmanager
def _pool(
    workers: int, settings: ShardSettings, *, with_template: bool
) -> Iterator[Callable[[Iterator[list[_Line]]], Iterator]]:
    """A map that keeps the order: in this process, or over workers with a bounded number of tasks in flight."""
    run = partial(_run_task, settings, with_template)
    if workers <= 1:
        yield partial(map, run)
        return
    # Each worker runs one tokenizer thread: parallelism comes from the processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:

        def ordered(tasks: Iterator[list[_Line]]) -> Iterator:
            flying = deque(pool.submit(run, task) for task in islice(tasks, 2 * workers))
            try:
                while flying:
                    yield flying.popleft().result()
                    flying.extend(pool.submit(run, task) for task in islice(tasks, 1))
            except BrokenProcessPool:
                raise DataError(
                    "a worker process was killed, probably for want of memory. Run the same command again, with fewer --workers, to "
                    "continue after the last finished shard."
                ) from None

        yield ordered


def _manifest(
    output: Path, progress: _Progress, run: str, settings: dict[str, Any], tokenizer: Any, template: ChatTemplate | None
) -> dict[str, Any]:
    names = [shard["name"] for shard in progress.shards]
    meta = layout.read_meta(output, names, ["score", "num_tokens", "num_trained"])
    lengths = meta["num_tokens"].to_numpy()
    scores = meta["score"].drop_null().to_numpy()
    if not len(lengths):
        why = ", ".join(f"{reason}: {n}" for reason, n in sorted(progress.reasons.items())) or "the inputs are empty"
        raise DataError(
            f"no trajectory was taken ({why}); see {output / layout.DROPPED}. Remove {output} before trying again."
        )
    files = {name: digest for shard in progress.shards for name, digest in shard["files"].items()}
    for path in [output / layout.DROPPED, *sorted((output / layout.TOKENIZER).iterdir())]:
        files[str(path.relative_to(output))] = layout.file_hash(path)
    return {
        "format_version": layout.FORMAT_VERSION,
        "run": run,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "template": {"hash": template.hash, "source": template.source} if template else None,
        "settings": settings,
        "counts": {
            "trajectories": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "trained_tokens": int(meta["num_trained"].to_numpy().sum(dtype=np.int64)),
            "dropped": sum(progress.reasons.values()),
        },
        "dropped": dict(sorted(progress.reasons.items())),
        "lengths": layout.distribution(lengths),
        "scores": layout.distribution(scores),
        "shards": [{"name": name} for name in names],
        "files": files,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
