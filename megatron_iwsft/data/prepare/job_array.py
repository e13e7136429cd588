"""Sharding as a job array: each task turns some of the input files into parts, and a merge makes the corpus of all of them.

A part holds the rows of one input file, before anything that depends on other files (duplicates, caps): so the merged corpus
is, byte for byte, the one that a single run makes. Parts lie in OUTPUT/parts/ until the merge has finished.

    parts/00003/00000.arrow, …   rows of input number 3, in order, in pieces of a few dozen blocks
    parts/00003/part.json        the run it belongs to and how far it is; `done` once the file is
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from megatron_iwsft.data.corpus import file_hash, sync
from megatron_iwsft.data.prepare.corpus_writer import Progress, resume
from megatron_iwsft.data.prepare.readers import read_blocks
from megatron_iwsft.data.prepare.shard import (
    Job,
    ShardSettings,
    finished_manifest,
    progress_bar,
    told_if_disk_fails,
    worker_pool,
    write_corpus,
)
from megatron_iwsft.errors import DataError

PARTS = "parts"
_STATE = "part.json"
_BLOCKS_PER_PIECE = 64


@dataclass
class _Part:
    """How far one input file is: `lines` of it are in `pieces` (file name → SHA-256)."""

    run: str
    lines: int = 0
    pieces: dict[str, str] = field(default_factory=dict)
    done: bool = False

    def save(self, directory: Path) -> None:
        partial = directory / f"{_STATE}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        sync(partial)
        os.replace(partial, directory / _STATE)


def make_parts(
    inputs: Sequence[str | Path],
    output: Path,
    settings: ShardSettings,
    *,
    task: int,
    tasks: int,
    workers: int = 1,
    encoder: Literal["auto", "own"] = "auto",
    show_progress: bool = True,
) -> list[str]:
    """Task `task` of `tasks` (from 0) of a job array: make the parts of every tasks-th input file; returns the files' names.

    Parts that are whole already are left as they are, and others continued. Raises DataError as `shard_corpus` does.
    """
    if not 0 <= task < tasks:
        raise DataError(f"task {task} of {tasks}: tasks are numbered 0 … {tasks - 1}.")
    job = Job(inputs, settings)
    if finished_manifest(output, job.run) is not None:
        return []
    mine = range(task, len(job.inputs), tasks)
    with told_if_disk_fails(output), worker_pool(job, workers, encoder) as mapper:
        for number in mine:
            directory = output / PARTS / f"{number:05d}"
            directory.mkdir(parents=True, exist_ok=True)
            part = _open(directory, job.run, job.inputs[number].name) or _Part(job.run)
            if part.done:
                continue
            with progress_bar([job.inputs[number]], show_progress) as bar:
                results = mapper(read_blocks(job.inputs[number], part.lines))
                _write_part(directory, part, results, bar)
    return [job.inputs[number].name for number in mine]


def _write_part(directory: Path, part: _Part, results: Iterator[Any], bar: tqdm) -> None:
    size = bar.total
    waiting: list[pa.RecordBatch] = []
    for block, rows in results:
        waiting.append(rows)
        part.lines = block.first + block.count
        bar.update(int(size * min(1.0, block.progress)) - bar.n)
        if len(waiting) == _BLOCKS_PER_PIECE:
            _write_piece(directory, part, waiting)
            waiting = []
    part.done = True
    _write_piece(directory, part, waiting)


def _write_piece(directory: Path, part: _Part, batches: list[pa.RecordBatch]) -> None:
    if batches:
        name = f"{len(part.pieces):05d}.arrow"
        partial = directory / f"{name}.partial"
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        sync(partial)
        os.replace(partial, directory / name)
        part.pieces[name] = file_hash(directory / name)
    part.save(directory)


def _open(directory: Path, run: str, name: str) -> _Part | None:
    """The state of a part, or None if it was not begun."""
    path = directory / _STATE
    if not path.exists():
        return None
    try:
        part = _Part(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"{path} is damaged. Remove {directory} and run its task again.") from None
    if part.run != run:
        raise DataError(
            f"the part of {name} in {directory.parent} was made from other inputs or settings. Remove that directory, or choose another "
            "--output."
        )
    return part


def merge_parts(
    inputs: Sequence[str | Path], output: Path, settings: ShardSettings, *, show_progress: bool = True
) -> dict[str, Any]:
    """Make the corpus directory `output` of the parts in it; returns its manifest. The parts are removed at the end.

    Raises DataError if a part is missing, unfinished, damaged, or made from other inputs or settings.
    """
    job = Job(inputs, settings)
    manifest = finished_manifest(output, job.run)
    if manifest is None:
        parts = _complete_parts(job, output)
        with told_if_disk_fails(output), progress_bar(job.inputs, show_progress) as bar:
            progress = resume(output, job.run)
            manifest = write_corpus(job, output, progress, _rows(job, output, parts, progress, bar), bar)
    shutil.rmtree(output / PARTS, ignore_errors=True)
    return manifest


def _complete_parts(job: Job, output: Path) -> list[_Part]:
    parts, missing = [], []
    for number, source in enumerate(job.inputs):
        part = _open(output / PARTS / f"{number:05d}", job.run, source.name)
        if part is None or not part.done:
            missing.append(f"{number} ({source.name})")
        else:
            parts.append(part)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(job.inputs)} parts in {output / PARTS} are missing or unfinished: {', '.join(missing[:5])}. "
            "Run the array's tasks again with the same inputs and settings; finished parts are not made again."
        )
    return parts


def _rows(
    job: Job, output: Path, parts: list[_Part], progress: Progress, bar: tqdm
) -> Iterator[tuple[int, pa.RecordBatch]]:
    done = 0
    for number, (source, part) in enumerate(zip(job.inputs, parts, strict=True)):
        done += source.size
        if number < progress.source:
            continue
        skip = progress.lines if number == progress.source else 0
        for name, expected in part.pieces.items():
            path = output / PARTS / f"{number:05d}" / name
            if file_hash(path) != expected:
                raise DataError(f"{path} is damaged. Remove its directory and run the array's task again.")
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                for k in range(reader.num_record_batches):
                    rows = reader.get_batch(k)
                    yield number, rows.filter(pc.greater(rows["line"], skip)) if skip else rows
        bar.update(done - bar.n)
