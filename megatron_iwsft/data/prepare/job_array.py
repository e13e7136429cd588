"""Sharding as a job array: each task encodes some of the input files as parts, and a merge builds the corpus from all parts.

A part holds the encoded rows of one input file, before any filter that depends on other files (duplicates, caps). So the merged
corpus is byte-identical to that of a single run. Parts are in OUTPUT/parts/ until the merge has finished.

    parts/00003/00000.arrow, …   rows of input number 3, in order, in pieces of a few dozen blocks
    parts/00003/part.json        the run it belongs to and its progress; `done` is true once the part is complete
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from megatron_iwsft.data.manifest import Count, Sha256
from megatron_iwsft.data.prepare.corpus_writer import (
    PARTS,
    Progress,
    exclusive_output,
    remove_progress,
    report_disk_errors,
    resume,
)
from megatron_iwsft.data.prepare.shard import (
    ShardingJob,
    ShardSettings,
    finished_manifest,
    progress_bar,
    worker_pool,
    write_corpus,
)
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import foreign_entry, partial_path, publish, sha256_file, write_text
from megatron_iwsft.utils.json_files import PlainName, is_regular_file, read_json
from megatron_iwsft.utils.locks import LOCK

_STATE = "part.json"
_BLOCKS_PER_PIECE = 64


class _State(TypedDict):
    run: str
    lines: Count
    pieces: dict[PlainName, Sha256]
    done: bool


@dataclass
class _Part:
    """Progress of one part: the first `lines` lines of the input file are in `pieces` (file name → SHA-256)."""

    run: str
    lines: int = 0
    pieces: dict[str, str] = field(default_factory=dict)
    done: bool = False

    def save(self, directory: Path) -> None:
        write_text(directory / _STATE, json.dumps(asdict(self)), single_writer=True)


def make_parts(
    inputs: Sequence[str | Path],
    output: Path,
    settings: ShardSettings,
    *,
    task: int,
    tasks: int,
    workers: int = 1,
    encoder: Literal["auto", "own"] = "auto",
    restart: bool = False,
    show_progress: bool = True,
) -> list[str]:
    """Task `task` of `tasks` (from 0) of a job array: write the parts of every tasks-th input file. Returns the files' names.

    Complete parts are kept and unfinished ones continued; `restart` discards those of other runs and damaged ones. Raises DataError in
    the same cases as `shard_corpus`.
    """
    if not 0 <= task < tasks:
        raise DataError(f"task {task} of {tasks}: tasks are numbered 0 … {tasks - 1}.")
    job = ShardingJob(inputs, settings)
    if finished_manifest(output, job.run_id) is not None:
        return []
    mine = range(task, len(job.inputs), tasks)
    with report_disk_errors(output), worker_pool(job, workers, encoder) as mapper:
        for number in mine:
            directory = output / PARTS / f"{number:05d}"
            with exclusive_output(directory):
                part = _load_or_begin_part(directory, job.run_id, job.inputs[number].name, restart=restart)
                if part.done:
                    continue
                with progress_bar([job.inputs[number]], show_progress) as bar:
                    results = mapper(job.blocks(number, part.lines))
                    _write_part(directory, part, results, bar)
    return [job.inputs[number].name for number in mine]


def _write_part(directory: Path, part: _Part, results: Iterator[Any], bar: tqdm) -> None:
    size = bar.total
    buffered: list[pa.RecordBatch] = []
    for block, rows in results:
        buffered.append(rows)
        part.lines = block.first + block.count
        bar.update(int(size * min(1.0, block.progress)) - bar.n)
        if len(buffered) == _BLOCKS_PER_PIECE:
            _write_piece(directory, part, buffered)
            buffered = []
    part.done = True
    _write_piece(directory, part, buffered)


def _write_piece(directory: Path, part: _Part, batches: list[pa.RecordBatch]) -> None:
    if batches:
        path = directory / f"{len(part.pieces):05d}.arrow"
        partial = partial_path(path)
        try:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        part.pieces[path.name] = sha256_file(path)
    part.save(directory)


def _load_or_begin_part(directory: Path, run: str, name: str, *, restart: bool) -> _Part:
    try:
        return _load_part(directory, run, name) or _Part(run)
    except DataError:
        if not restart:
            raise
    for path in directory.iterdir():
        if path.name != LOCK:
            path.unlink()
    return _Part(run)


def _load_part(directory: Path, run: str, name: str) -> _Part | None:
    """The state of a part, or None if it was not started."""
    path = directory / _STATE
    if not path.exists():
        return None
    found = foreign_entry(directory)
    advice = "Run its task again with --restart."
    if found is not None:
        raise DataError(f"{found[0]} is {found[1]}, which is not part of a share. {advice}")
    part = _Part(**read_json(path, _State, DataError, advice=advice))
    if part.run != run:
        raise DataError(
            f"the part of {name} in {directory.parent} was created from other inputs or settings. Run the tasks again with --restart, or "
            "choose another --output."
        )
    return part


def merge_parts(
    inputs: Sequence[str | Path],
    output: Path,
    settings: ShardSettings,
    *,
    restart: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the corpus in directory `output` from the parts there, then remove them. Returns the manifest.

    Raises DataError if a part is missing, unfinished, damaged, or was created from other inputs or settings.
    """
    job = ShardingJob(inputs, settings)
    manifest = finished_manifest(output, job.run_id)
    if manifest is not None:
        with report_disk_errors(output), exclusive_output(output):
            remove_progress(output, [shard["name"] for shard in manifest["shards"]])
    else:
        parts = _complete_parts(job, output)
        with (
            report_disk_errors(output),
            exclusive_output(output),
            progress_bar(job.inputs, show_progress) as bar,
        ):
            progress = resume(output, job.run_id, inputs=len(job.inputs), restart=restart)
            manifest = write_corpus(job, output, progress, _remaining_rows(job, output, parts, progress, bar), bar)
    shutil.rmtree(output / PARTS, ignore_errors=True)
    return manifest


def _complete_parts(job: ShardingJob, output: Path) -> list[_Part]:
    parts, missing = [], []
    for number, source in enumerate(job.inputs):
        part = _load_part(output / PARTS / f"{number:05d}", job.run_id, source.name)
        if part is None or not part.done:
            missing.append(f"{number} ({source.name})")
        else:
            parts.append(part)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(job.inputs)} parts in {output / PARTS} are missing or unfinished: {', '.join(missing[:5])}. "
            "Run the array's tasks again with the same inputs and settings; finished parts are kept."
        )
    return parts


def _remaining_rows(
    job: ShardingJob, output: Path, parts: list[_Part], progress: Progress, bar: tqdm
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(input number, rows) from the parts, after what `progress` says is done."""
    done = 0
    for number, (source, part) in enumerate(zip(job.inputs, parts, strict=True)):
        done += source.size
        if number < progress.source:
            continue
        skip = progress.lines if number == progress.source else 0
        for name, expected in part.pieces.items():
            path = output / PARTS / f"{number:05d}" / name
            if not is_regular_file(path) or sha256_file(path) != expected:
                raise DataError(f"{path} is damaged. Run the array's task again with --restart.")
            for rows in _batches(path, job.row_schema):
                yield number, rows.filter(pc.greater(rows["line"], skip)) if skip else rows
        bar.update(done - bar.n)


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of a piece. Raises DataError if they are not what a task writes."""
    damaged = f"{path} is damaged. Run the array's task again with --restart."
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            for k in range(reader.num_record_batches):
                batch = reader.get_batch(k)
                batch.validate(full=True)
                if not batch.schema.equals(schema):
                    raise DataError(damaged)
                yield batch
        except (pa.ArrowException, ValueError):
            raise DataError(damaged) from None
