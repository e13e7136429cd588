"""The last stage of sharding, in one process and in input order: duplicates, caps, shards, the list of what was dropped.

It takes rows however they arrive (from worker processes, or from the parts that a job array has written) and depends on their
order alone. After each finished shard it notes its position, from which an interrupted run continues.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.data import corpus as layout
from megatron_iwsft.data.prepare.dedup import HashSet, NearDuplicates
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.errors import DataError

PROGRESS = ".progress.json"
_SIGNATURES = ".signatures"


@dataclass
class Progress:
    """Where a run stands after its last finished shard: `lines` of input number `source` are done, and all before it."""

    run: str
    source: int = 0
    lines: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    dropped_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    done: bool = False

    def save(self, output: Path) -> None:
        partial = output / f"{PROGRESS}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        layout.sync(partial)
        os.replace(partial, output / PROGRESS)


def resume(output: Path, run: str) -> Progress:
    """The progress of run `run` in `output`, or a new one. Raises DataError if the directory holds something else."""
    path = output / PROGRESS
    if path.exists():
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        if progress.run != run:
            raise DataError(f"{output} was begun from other inputs or settings. Choose another --output, or remove it.")
        return progress
    unknown = sorted(p.name for p in output.iterdir() if p.name not in (layout.DROPPED, f"{PROGRESS}.partial", "parts"))
    if unknown:
        raise DataError(
            f"{output} is not empty and no corpus was begun there (it holds {', '.join(unknown[:3])}). Choose another --output."
        )
    progress = Progress(run=run)
    progress.save(output)
    return progress


class OrderedWriter:
    """Takes the rows of blocks in input order and writes the shards of a corpus. A context manager."""

    def __init__(
        self, output: Path, progress: Progress, token_dtype: np.dtype, curation: Curation, shard_tokens: int
    ) -> None:
        self.output, self.progress = output, progress
        self._dtype, self._curation, self._shard_tokens = token_dtype, curation, shard_tokens
        self._seen = HashSet()
        self._alike = NearDuplicates(curation.near_duplicates) if curation.near_duplicates is not None else None
        self._taken: Counter[str] = Counter()  # trajectories of each source
        self._signatures: list[pa.Array] = []  # of the unfinished shard
        for shard in progress.shards:
            self._remember(shard["name"])
        self.reasons = Counter(progress.reasons)
        self.trajectories = self.tokens = 0
        self._dropped = open(output / layout.DROPPED, "ab")  # noqa: SIM115 - closed in __exit__
        self._dropped.truncate(progress.dropped_bytes)
        self._dropped.seek(progress.dropped_bytes)
        self._shard: layout.ShardWriter | None = None

    def __enter__(self) -> OrderedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._dropped.close()
        if self._shard is not None:
            self._shard.abandon()

    def take(self, source: int, file: str, rows: pa.RecordBatch) -> None:
        """Add the rows of the next block, which belong to input number `source`, called `file`."""
        rows = self._apply_order(rows)
        while rows.num_rows:
            rows = self._write_some(source, file, rows)

    def finish(self) -> None:
        """Write what is left as the last shard, and have the list of dropped records on disk."""
        if self._shard is not None:
            self._finish_shard(self.progress.source, self.progress.lines)
        self._dropped.flush()
        os.fsync(self._dropped.fileno())
        self.progress.reasons = dict(self.reasons)

    def _apply_order(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows with the reasons that depend on earlier ones filled in."""
        alive = np.flatnonzero(rows["reason"].is_null().to_numpy(zero_copy_only=False))
        verdicts: dict[int, tuple[str, str]] = {}
        new = self._seen.add(_keys(rows["content_hash"])[alive])
        for row in alive[~new].tolist():
            verdicts[row] = "duplicate", rows["content_hash"][row].as_py().hex()
        if self._alike is not None or self._curation.max_per_source is not None:
            for row in alive[new].tolist():
                verdict = self._verdict(rows, row)
                if verdict:
                    verdicts[row] = verdict
        if not verdicts:
            return rows
        reasons, details = rows["reason"].to_pylist(), rows["detail"].to_pylist()
        for row, (reason, detail) in verdicts.items():
            reasons[row], details[row] = reason, detail
        schema = rows.schema
        columns = dict(zip(schema.names, rows.columns, strict=True))
        columns |= {"reason": pa.array(reasons, pa.string()), "detail": pa.array(details, pa.string())}
        return pa.record_batch(list(columns.values()), schema=schema)

    def _verdict(self, rows: pa.RecordBatch, row: int) -> tuple[str, str] | None:
        source, limit = rows["source"][row].as_py(), self._curation.max_per_source
        if limit is not None and self._taken[source] >= limit:
            return "over the cap of its source", f"{source} has {limit} already"
        if self._alike is not None:
            alike = self._alike.find_or_add(rows["id"][row].as_py(), rows["signature"][row].as_py())
            if alike is not None:
                return "near-duplicate", f"resembles {alike}"
        self._taken[source] += 1
        return None

    def _write_some(self, source: int, file: str, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Write rows up to the end of the current shard; returns the rest."""
        kept = rows["reason"].is_null().to_numpy(zero_copy_only=False)
        lines = rows["line"].to_numpy()
        lengths = np.where(kept, rows["tokens"].value_lengths().to_numpy(), 0)
        room = self._shard_tokens - (self._shard.num_tokens if self._shard is not None else 0)
        full = np.cumsum(lengths) >= room
        # A shard ends with the line that fills it: all trajectories of one record stand together.
        end = int(np.searchsorted(lines, lines[np.argmax(full)], side="right")) if full.any() else len(lines)
        part, kept = rows.slice(0, end), kept[:end]
        if not kept.all():
            self._note_dropped(file, part.filter(pa.array(~kept)))
            part = part.filter(pa.array(kept))
        if part.num_rows:
            if self._shard is None:
                self._shard = layout.ShardWriter(self.output, len(self.progress.shards), self._dtype)
            self._shard.append(part, file)
            self.trajectories += part.num_rows
            self.tokens += int(lengths[:end].sum())
            if self._alike is not None:
                self._signatures.append(part["signature"])
        if full.any():
            self._finish_shard(source, int(lines[end - 1]))
        else:
            self.progress.source, self.progress.lines = source, int(lines[end - 1])
        return rows.slice(end)

    def _note_dropped(self, file: str, rows: pa.RecordBatch) -> None:
        columns = [rows[name].to_pylist() for name in ("line", "id", "reason", "detail")]
        for line, name, reason, detail in zip(*columns, strict=True):
            self.reasons[reason] += 1
            entry = {"file": file, "line": line, "id": name, "reason": reason}
            if detail:
                entry["detail"] = detail
            self._dropped.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def _finish_shard(self, source: int, lines: int) -> None:
        assert self._shard is not None
        name = self._shard.name
        if self._alike is not None:
            path = self.output / f"{name}{_SIGNATURES}"
            pq.write_table(pa.table({"signature": pa.chunked_array(self._signatures)}), path)
            self._signatures = []
        files = self._shard.close()
        self._shard = None
        self._dropped.flush()
        os.fsync(self._dropped.fileno())
        self.progress.shards.append({"name": name, "files": files})
        self.progress.source, self.progress.lines = source, lines
        self.progress.dropped_bytes = self._dropped.tell()
        self.progress.reasons = dict(self.reasons)
        self.progress.save(self.output)

    def _remember(self, shard: str) -> None:
        """Take up what a finished shard of an interrupted run holds."""
        columns = ["id", "source", "content_hash"]
        meta = layout.read_meta(self.output, [shard], columns).combine_chunks()
        self._seen.add(_keys(meta["content_hash"].combine_chunks()))
        self._taken.update(meta["source"].to_pylist())
        if self._alike is not None:
            signatures = pq.read_table(self.output / f"{shard}{_SIGNATURES}")["signature"].to_pylist()
            for name, signature in zip(meta["id"].to_pylist(), signatures, strict=True):
                self._alike.find_or_add(name, signature)


def forget_progress(output: Path, shards: Iterable[str]) -> None:
    """Remove what only an interrupted run needs."""
    for name in shards:
        (output / f"{name}{_SIGNATURES}").unlink(missing_ok=True)
    (output / PROGRESS).unlink(missing_ok=True)


def _keys(hashes: pa.Array) -> np.ndarray:
    """The first 128 bits of SHA-256 hashes (binary(32), none null), uint64 [n, 2]."""
    raw = np.frombuffer(hashes.buffers()[1], np.uint64).reshape(-1, 4)
    return raw[hashes.offset : hashes.offset + len(hashes), :2]
