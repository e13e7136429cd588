"""The last stage of sharding, in one process and in input order: deduplication, caps per source, shards, dropped.jsonl.

The rows come from worker processes or from the parts of a job array. The corpus depends only on their order, not on how they are
split into blocks. After each finished shard the position in the input is saved, and an interrupted run continues from there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from megatron_iwsft.data.corpus import DROPPED, TOKENIZER, ShardWriter, shard_name
from megatron_iwsft.data.indexed import check_own_file
from megatron_iwsft.data.manifest import BlockSums, Count, Sha256, shard_files
from megatron_iwsft.data.metadata import read_meta
from megatron_iwsft.data.prepare.dedup import HashSet, NearDuplicates
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import flush_to_disk, foreign_entry, partial_path, publish, write_text
from megatron_iwsft.utils.json_files import PlainName, read_json
from megatron_iwsft.utils.locks import LOCK, exclusive

PROGRESS = ".progress.json"
PARTS = "parts"
SIGNATURES = ".signatures"
_MOST_KEYS = 100  # unused ones that are counted
# What filters could not judge.
SHORT = "fewer than 8 words: only compared with benchmark problems as short"
NO_WORDS = "no words: not compared with near-duplicates"


class _Shard(TypedDict):
    name: PlainName
    files: dict[PlainName, Sha256]
    blocks: NotRequired[dict[PlainName, BlockSums]]


class _State(TypedDict):
    run: str
    source: Count
    lines: Count
    shards: list[_Shard]
    dropped_bytes: Count
    reasons: dict[str, Count]
    records: dict[str, Count]
    unchecked: dict[str, Count]
    unused_keys: dict[str, Count]
    done: bool


@dataclass
class Progress:
    """State of a run after its last finished shard: it has read all inputs before number `source`, and `lines` lines of that one.

    Its fields are the keys of the progress file. `records`: how many there were in each input file; `unchecked`: how many
    kept trajectories a filter could not judge, and why; `unused_keys`: in how many records messages have a key that is not used.
    """

    run: str
    source: int = 0
    lines: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    dropped_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    unchecked: dict[str, int] = field(default_factory=dict)
    unused_keys: dict[str, int] = field(default_factory=dict)
    done: bool = False

    def save(self, output: Path) -> None:
        write_text(output / PROGRESS, json.dumps(asdict(self)), single_writer=True)


@contextmanager
def exclusive_output(directory: Path) -> Iterator[None]:
    """Create a directory for writing, if there is none, and lock it. Raises DataError if another command writes there.

    An error leaves no empty directory behind.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(directory, DataError):
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            directory.rmdir()
        raise


@contextmanager
def report_disk_errors(output: Path) -> Iterator[None]:
    """Turn an OSError while writing `output` into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the corpus at {output}: {error.strerror or error} ({error.filename or output}). The corpus is "
            "incomplete; fix the problem, then run the same command to continue."
        ) from None


def resume(output: Path, run: str, *, inputs: int, restart: bool = False) -> Progress:
    """The progress of run `run` of `inputs` files in `output`, or a new one.

    What an unfinished run left is discarded if `restart` says so, or if it was another run that finished no shard. Raises DataError
    if it is damaged or of another run, or if the directory contains anything else.
    """
    found = foreign_entry(output)
    if found is not None:
        raise DataError(
            f"{found[0]} is {found[1]}, which sharding does not create. Remove it, or choose another --output."
        )
    if (output / PROGRESS).exists():
        progress = None if restart else _resumed(output, run, inputs)
        if progress is not None:
            return progress
        _discard(output)
    expected = (DROPPED, partial_path(output / PROGRESS).name, PARTS, LOCK)
    unknown = sorted(p.name for p in output.iterdir() if p.name not in expected)
    if unknown:
        raise DataError(
            f"{output} is not empty and has no unfinished corpus (it contains {', '.join(unknown[:3])}). Choose another --output."
        )
    progress = Progress(run=run)
    progress.save(output)
    return progress


def _resumed(output: Path, run: str, inputs: int) -> Progress | None:
    """The progress of an unfinished run; None if it was another run that finished no shard."""
    path, advice = output / PROGRESS, "Repeat the command with --restart, or choose another --output."
    state: dict[str, Any] = dict(read_json(path, _State, DataError, advice=advice))
    progress = Progress(**state)
    if progress.run != run:
        if not progress.shards:
            return None
        raise DataError(
            f"{output} was started with other inputs or settings, and has {len(progress.shards)} finished shards of them. Repeat that "
            "command to continue, add --restart to discard them, or choose another --output."
        )
    expected = [set(shard_files(shard_name(k))) for k in range(len(progress.shards))]
    if progress.source > inputs or [set(shard["files"]) for shard in progress.shards] != expected:
        raise DataError(f"{path} is damaged: it does not describe a run of {inputs} input files. {advice}")
    for shard in progress.shards:
        for name in shard["files"]:
            check_own_file(output / name)
    size = (output / DROPPED).stat().st_size if (output / DROPPED).exists() else 0
    if size < progress.dropped_bytes:
        raise DataError(f"{output / DROPPED} has {size} bytes of the {progress.dropped_bytes} written. {advice}")
    return progress


def _discard(output: Path) -> None:
    """Remove what an unfinished run wrote, the progress file last."""
    for path in output.glob("shard-[0-9]*"):
        path.unlink()
    if (output / TOKENIZER).exists():
        shutil.rmtree(output / TOKENIZER)
    for name in (DROPPED, PROGRESS):
        (output / name).unlink(missing_ok=True)


class CorpusWriter:
    """Writes the shards and dropped.jsonl of a corpus from rows in input order. A context manager."""

    def __init__(
        self, output: Path, progress: Progress, token_dtype: np.dtype, curation: Curation, shard_tokens: int
    ) -> None:
        self.output, self.progress = output, progress
        self._dtype, self._curation, self._shard_tokens = token_dtype, curation, shard_tokens
        self._hashes = HashSet()
        self._near_duplicates = (
            NearDuplicates(curation.near_duplicates) if curation.near_duplicates is not None else None
        )
        self._source_counts: Counter[str] = Counter()  # trajectories kept of each source
        self._signatures: list[pa.Array] = []  # of the current shard
        for shard in progress.shards:
            self._restore(shard["name"])
        self.reasons, self.records = Counter(progress.reasons), Counter(progress.records)
        self.unchecked, self.unused_keys = Counter(progress.unchecked), Counter(progress.unused_keys)
        self.trajectories = self.tokens = 0
        self._dropped = open(output / DROPPED, "ab")  # noqa: SIM115 - closed in __exit__
        self._dropped.truncate(progress.dropped_bytes)
        self._dropped.seek(progress.dropped_bytes)
        self._shard: ShardWriter | None = None

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.abandon()
        self._dropped.close()

    def append(self, source: int, file: str, rows: pa.RecordBatch) -> None:
        """Add the next rows, which come from input number `source`, named `file`."""
        rows = self._filter_in_order(rows)
        while rows.num_rows:
            rows = self._write_to_shard(source, file, rows)

    def finish(self) -> None:
        """Finish the last shard and flush dropped.jsonl to disk."""
        if self._shard is not None:
            self._finish_shard(self.progress.source, self.progress.lines)
        self._flush_dropped()
        self._update_counts()

    def _update_counts(self) -> None:
        self.progress.reasons = dict(self.reasons)
        self.progress.records = dict(self.records)
        self.progress.unused_keys = dict(self.unused_keys)
        self.progress.unchecked = {why: count for why, count in self.unchecked.items() if count}

    def _filter_in_order(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Apply the filters that depend on earlier rows. Returns the rows with `reason` and `detail` filled in."""
        alive = np.flatnonzero(rows["reason"].is_null().to_numpy(zero_copy_only=False))
        drops: dict[int, tuple[str, str]] = {}
        new = self._hashes.add(_hash_keys(rows["content_hash"])[alive])
        for row in alive[~new].tolist():
            drops[row] = "duplicate", rows["content_hash"][row].as_py().hex()
        if self._near_duplicates is not None or self._curation.max_per_source is not None:
            for row in alive[new].tolist():
                drop = self._drop_reason(rows, row)
                if drop:
                    drops[row] = drop
        if not drops:
            return rows
        reasons, details = rows["reason"].to_pylist(), rows["detail"].to_pylist()
        for row, (reason, detail) in drops.items():
            reasons[row], details[row] = reason, detail
        schema = rows.schema
        columns = dict(zip(schema.names, rows.columns, strict=True))
        columns |= {"reason": pa.array(reasons, pa.string()), "detail": pa.array(details, pa.string())}
        return pa.record_batch(list(columns.values()), schema=schema)

    def _drop_reason(self, rows: pa.RecordBatch, row: int) -> tuple[str, str] | None:
        """(reason, detail) if a row is over its source's cap or a near-duplicate, else None."""
        source, limit = rows["source"][row].as_py(), self._curation.max_per_source
        if limit is not None and self._source_counts[source] >= limit:
            return "over the cap of its source", f"{source} already has {limit}"
        signature = rows["signature"][row].as_py() if self._near_duplicates is not None else None
        if self._near_duplicates is not None and signature is not None:
            similar = self._near_duplicates.find_or_add(rows["id"][row].as_py(), signature)
            if similar is not None:
                return "near-duplicate", f"similar to {similar}"
        self._source_counts[source] += 1
        return None

    def _write_to_shard(self, source: int, file: str, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Write rows until the current shard is full. Returns the remaining rows."""
        kept = rows["reason"].is_null().to_numpy(zero_copy_only=False)
        lines = rows["line"].to_numpy()
        lengths = np.where(kept, rows["tokens"].value_lengths().to_numpy(), 0)
        room = self._shard_tokens - (self._shard.num_tokens if self._shard is not None else 0)
        full = np.cumsum(lengths) >= room
        # A shard ends after the line that fills it, so that all trajectories of one record are in one shard.
        end = int(np.searchsorted(lines, lines[np.argmax(full)], side="right")) if full.any() else len(lines)
        part, kept = rows.slice(0, end), kept[:end]
        self.records[file] += int(np.count_nonzero(np.diff(lines[:end]))) + 1  # a record's rows are never split
        self._count_unused_keys(part)
        if not kept.all():
            self._write_dropped(file, part.filter(pa.array(~kept)))
            part = part.filter(pa.array(kept))
        if part.num_rows:
            if self._shard is None:
                self._shard = ShardWriter(self.output, len(self.progress.shards), self._dtype)
            self._shard.append(part, file)
            self.trajectories += part.num_rows
            self.tokens += int(lengths[:end].sum())
            self._count_unchecked(part)
            if self._near_duplicates is not None:
                self._signatures.append(part["signature"])
        if full.any():
            self._finish_shard(source, int(lines[end - 1]))
        else:
            self.progress.source, self.progress.lines = source, int(lines[end - 1])
        return rows.slice(end)

    def _count_unused_keys(self, rows: pa.RecordBatch) -> None:
        for keys in rows["unused_keys"].drop_null().to_pylist():
            known = len(self.unused_keys) < _MOST_KEYS
            self.unused_keys.update(key for key in keys if known or key in self.unused_keys)

    def _count_unchecked(self, kept: pa.RecordBatch) -> None:
        if "short" in kept.schema.names:
            self.unchecked[SHORT] += kept["short"].true_count
        if "signature" in kept.schema.names:
            self.unchecked[NO_WORDS] += kept["signature"].null_count

    def _write_dropped(self, file: str, rows: pa.RecordBatch) -> None:
        columns = [rows[name].to_pylist() for name in ("line", "id", "reason", "detail")]
        for line, name, reason, detail in zip(*columns, strict=True):
            self.reasons[reason] += 1
            entry = {"file": file, "line": line, "id": name, "reason": reason}
            if detail:
                entry["detail"] = detail
            self._dropped.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def _flush_dropped(self) -> None:
        self._dropped.flush()
        flush_to_disk(self.output / DROPPED)

    def _finish_shard(self, source: int, lines: int) -> None:
        assert self._shard is not None
        name = self._shard.name
        if self._near_duplicates is not None:
            self._write_signatures(self.output / f"{name}{SIGNATURES}")
        checksums = self._shard.close()
        self._shard = None
        self._flush_dropped()
        self.progress.shards.append({"name": name, **{k: v for k, v in vars(checksums).items() if v}})
        self.progress.source, self.progress.lines = source, lines
        self.progress.dropped_bytes = self._dropped.tell()
        self._update_counts()
        self.progress.save(self.output)

    def _write_signatures(self, path: Path) -> None:
        partial = partial_path(path)
        try:
            pq.write_table(pa.table({"signature": pa.chunked_array(self._signatures)}), partial)
            publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._signatures = []

    def _restore(self, shard: str) -> None:
        """Add a finished shard of an interrupted run to the state of the in-order filters."""
        columns = ["id", "source", "content_hash"]
        meta = read_meta(self.output, [shard], columns).combine_chunks()
        self._hashes.add(_hash_keys(meta["content_hash"].combine_chunks()))
        self._source_counts.update(meta["source"].to_pylist())
        if self._near_duplicates is not None:
            path = self.output / f"{shard}{SIGNATURES}"
            try:
                signatures = pq.read_table(path)["signature"].to_pylist()
                for name, signature in zip(meta["id"].to_pylist(), signatures, strict=True):
                    if signature is not None:
                        self._near_duplicates.find_or_add(name, signature)
            except Exception:  # of pyarrow's readers and rensa's Rust code
                raise DataError(f"{path} is damaged. Run the command again with --restart.") from None


def has_progress(output: Path) -> bool:
    """Whether a command that was killed after the corpus was finished left files that only an interrupted run needs."""
    return (output / PROGRESS).exists() or (output / LOCK).exists()


def remove_progress(output: Path, shards: Iterable[str]) -> None:
    """Remove the files that only an interrupted run needs."""
    for name in shards:
        (output / f"{name}{SIGNATURES}").unlink(missing_ok=True)
    (output / PROGRESS).unlink(missing_ok=True)


def _hash_keys(hashes: pa.Array) -> np.ndarray:
    """The first 128 bits of n SHA-256 hashes (binary(32), no nulls), as uint64 [n, 2]."""
    raw = np.frombuffer(hashes.buffers()[1], np.uint64).reshape(-1, 4)
    return raw[hashes.offset : hashes.offset + len(hashes), :2]
