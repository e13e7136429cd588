"""Build a corpus directory from records: the pipeline of reading, encoding and writing.

The main process reads blocks of input, worker processes encode them as rows (`encode.py`), and the main process writes the rows in
input order (`corpus_writer.py`). So the corpus does not depend on the number of workers, and an interrupted run continues after its
last finished shard. A job array encodes file by file (`job_array.py`); merging its parts is only the last stage.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tqdm import tqdm

from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.checksums import Checksums, checksum_file
from megatron_iwsft.data.corpus import DROPPED, TOKENIZER
from megatron_iwsft.data.indexed import token_dtype
from megatron_iwsft.data.manifest import FORMAT_VERSION, MANIFEST, check_manifest, distribution, write_manifest
from megatron_iwsft.data.metadata import read_meta
from megatron_iwsft.data.prepare.corpus_writer import (
    CorpusWriter,
    Progress,
    exclusive_output,
    has_progress,
    remove_progress,
    report_disk_errors,
    resume,
)
from megatron_iwsft.data.prepare.encode import BlockEncoder, row_schema
from megatron_iwsft.data.prepare.fast_encoding import choose_encoder
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.messages import FLAGS, WEIGHT, Dropped, UnreadableKeys
from megatron_iwsft.data.prepare.readers import Block, Input, find_inputs, fingerprint, numbered_records, read_blocks
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE, Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.json_files import read_json
from megatron_iwsft.utils.memory import keep_freed_memory
from megatron_iwsft.utils.worker_processes import one_thread_each, worker_context

log = logging.getLogger(__name__)

_SAMPLE_FILES, _SAMPLE_RECORDS = 8, 400
_SHOWN_KEYS = 20  # in a message


@dataclass(frozen=True)
class ShardSettings:
    """Everything that determines the content of a corpus, except the input files.

    tokenizer     path of a tokenizer (see `load_tokenizer`)
    template      name of a chat-template preset; None for the tokenizer's own template
    shard_tokens  a shard is finished when it reaches this many tokens
    """

    tokenizer: str
    template: str | None = None
    record: RecordFormat = field(default_factory=RecordFormat)
    shard_tokens: int = 100_000_000
    curation: Curation = field(default_factory=Curation)


class ShardingJob:
    """Inputs, tokenizer and template of a sharding run. `run_id` is a hash of everything that determines the corpus."""

    def __init__(self, inputs: Sequence[str | Path], settings: ShardSettings) -> None:
        self.inputs = find_inputs(inputs)
        self._states = [source.state for source in self.inputs]
        self.settings = settings
        settings.curation.check_libraries()
        self.tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        self.template = _template(self.tokenizer, settings) if self._needs_template() else None
        self.manifest_settings: dict[str, Any] = {
            "template": settings.template or "tokenizer",
            "template_hash": self.template.hash if self.template else None,
            "record": asdict(settings.record),
            "curation": settings.curation.manifest_entry(),
            "shard_tokens": settings.shard_tokens,
        }
        self.manifest_inputs: list[dict[str, Any]] = [
            {"name": i.name, "bytes": i.size, "sha256": fingerprint(i)} for i in self.inputs
        ]
        content = {**self.manifest_settings, "tokenizer": self.tokenizer.fingerprint, "inputs": self.manifest_inputs}
        self.run_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def row_schema(self) -> pa.Schema:
        """Of the rows that the workers return."""
        return row_schema(token_dtype(self.tokenizer.vocab_size), self.settings.curation)

    def blocks(self, number: int, skip: int = 0) -> Iterator[Block]:
        """The blocks of input number `number` after its first `skip` lines."""
        return read_blocks(self.inputs[number], skip, longest=self.settings.curation.max_record_bytes)

    def check_inputs(self) -> None:
        """Raise DataError if an input file has changed since this job was created."""
        for source, state, entry in zip(self.inputs, self._states, self.manifest_inputs, strict=True):
            if source.state != state and fingerprint(source) != entry["sha256"]:
                raise DataError(
                    f"input file {source.path} was changed while it was read. When nothing writes to it any more, run the command again "
                    "with --restart."
                )

    def _needs_template(self) -> bool:
        """Whether any record of the first block has text to render; records that are tokenized already need no template."""
        longest = self.settings.curation.max_record_bytes
        for number in range(len(self.inputs)):
            for block in self.blocks(number):
                records = [r for _, r in numbered_records(block, longest=longest) if not isinstance(r, Dropped)]
                if records:
                    return any("input_ids" not in record for record in records)
        return True


def shard_corpus(
    inputs: Sequence[str | Path],
    output: Path,
    settings: ShardSettings,
    *,
    workers: int = 1,
    encoder: Literal["auto", "own"] = "auto",
    restart: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the corpus directory `output` from input files or glob patterns, or finish building it. Returns the manifest.

    `encoder`: "auto" uses gigatoken if it gives the same ids, "own" always the tokenizer's own library. `restart` discards what an
    unfinished run left. A finished corpus with the same inputs and settings is not changed. Raises DataError if an input is missing,
    damaged or changes meanwhile, if the tokenizer or template is unsuitable, or if `output` contains anything but this corpus.
    """
    job = ShardingJob(inputs, settings)
    finished = finished_manifest(output, job.run_id)
    if finished is not None and not has_progress(output):
        log.info(f"{output} is already complete for these inputs and settings")
        return finished
    with report_disk_errors(output), exclusive_output(output):
        finished = finished_manifest(output, job.run_id)
        if finished is not None:  # by a command that held the lock until now, or was killed while it cleaned up
            remove_progress(output, [shard["name"] for shard in finished["shards"]])
            return finished
        progress = resume(output, job.run_id, inputs=len(job.inputs), restart=restart)
        if progress.shards:
            log.info(f"resuming {output} after {len(progress.shards)} finished shards")
        with progress_bar(job.inputs, show_progress) as bar, worker_pool(job, workers, encoder) as mapper:
            blocks = mapper(_remaining_blocks(job, progress))
            return write_corpus(job, output, progress, _with_progress(blocks, bar, job.inputs), bar)


def write_corpus(
    job: ShardingJob, output: Path, progress: Progress, blocks: Iterable[tuple[int, pa.RecordBatch]], bar: tqdm
) -> dict[str, Any]:
    """The last stage: write shards and manifest from (input number, rows) of every block, in order. Returns the manifest."""
    settings = job.settings
    dtype = token_dtype(job.tokenizer.vocab_size)
    with CorpusWriter(output, progress, dtype, settings.curation, settings.shard_tokens) as writer:
        for source, rows in blocks:
            writer.append(source, job.inputs[source].name, rows)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{writer.tokens / max(elapsed, 1e-9) / 1e6:.2f} M tokens/s", refresh=False)
        writer.finish()
    job.check_inputs()
    job.tokenizer.copy_to(output / TOKENIZER)
    if job.template is not None and settings.template is not None:
        (output / TOKENIZER / CHAT_TEMPLATE).write_text(job.template.source, encoding="utf-8")
    manifest = _manifest(output, progress, job)
    write_manifest(output, manifest)
    remove_progress(output, [shard["name"] for shard in progress.shards])
    return manifest


def finished_manifest(output: Path, run: str) -> dict[str, Any] | None:
    """The manifest of run `run` if it is finished, else None. Raises DataError if `output` is the corpus of another run."""
    path = output / MANIFEST
    if not path.exists():
        return None
    advice = "Choose another --output, or remove it."
    manifest = read_json(path, dict[str, Any], DataError, advice=advice)
    if manifest.get("run") == run:
        return check_manifest(manifest, where=str(path), advice=advice)
    raise DataError(f"{output} already contains a corpus created from other inputs or settings. {advice}")


@contextmanager
def worker_pool(
    job: ShardingJob, workers: int, encoder: Literal["auto", "own"]
) -> Iterator[Callable[[Iterable[Block]], Iterator[tuple[Block, pa.RecordBatch]]]]:
    """Yields a function that maps blocks to (block without payload, rows), in order, with at most 2·workers blocks in flight."""
    if encoder == "own":
        log.info("encoding with the tokenizer's own library, as requested")
    encode = partial(_encode_block, job.settings, job.template is not None)
    compare = job.template is not None and encoder == "auto"
    choose = partial(_choose_encoder, job.settings, _sample(job.inputs) if compare else [])
    if workers <= 1:
        yield partial(_refusing, partial(map, partial(encode, _logged(*choose()))))
        return
    one_thread_each()
    with ProcessPoolExecutor(workers, worker_context(), initializer=_start_worker) as pool:
        chosen = pool.submit(choose)
        for _ in range(workers - 1):
            pool.submit(os.getpid)  # the other workers start meanwhile

        def map_in_order(blocks: Iterable[Block]) -> Iterator[tuple[Block, pa.RecordBatch | UnreadableKeys]]:
            waiting = iter(blocks)
            try:
                run = partial(encode, _logged(*chosen.result()))
                in_flight = deque(pool.submit(run, block) for block in islice(waiting, 2 * workers))
                while in_flight:
                    result = in_flight.popleft().result()
                    in_flight.extend(pool.submit(run, block) for block in islice(waiting, 1))
                    yield result
            except BrokenProcessPool:
                raise DataError(
                    "a worker process exited unexpectedly (probably out of memory; check dmesg). Run the same command again, with fewer "
                    "--workers, to continue after the last finished shard."
                ) from None
            except BaseException:  # also if the caller needs no more rows
                pool.shutdown(cancel_futures=True)
                raise

        yield partial(_refusing, map_in_order)


def use_memory_again() -> None:
    """Arrays of numpy and of Arrow, in this process. Not for libraries."""
    keep_freed_memory()
    pa.set_memory_pool(pa.system_memory_pool())


def _start_worker() -> None:
    use_memory_again()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    gc.freeze()
    # Collect rarely: a block's many small objects live until the block is done, so scanning them earlier is wasted.
    gc.set_threshold(100_000, 50, 50)


def _exit_with_parent() -> None:
    """Exit when the parent process exits. Otherwise workers whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _tokenizer_and_template(settings: ShardSettings, with_template: bool) -> tuple[Tokenizer, ChatTemplate | None]:
    """This process's."""
    tokenizer = load_tokenizer(settings.tokenizer)
    return tokenizer, _template(tokenizer, settings) if with_template else None


@lru_cache(maxsize=1)
def _block_encoder(settings: ShardSettings, with_template: bool, fast: bool) -> BlockEncoder:
    """This process's encoder, created at its first block."""
    tokenizer, template = _tokenizer_and_template(settings, with_template)
    return BlockEncoder(tokenizer, template, settings.record, settings.curation, fast=fast)


def _encode_block(
    settings: ShardSettings, with_template: bool, fast: bool, block: Block
) -> tuple[Block, pa.RecordBatch | UnreadableKeys]:
    encoder, done = _block_encoder(settings, with_template, fast), replace(block, payload=b"")
    try:
        return done, UnreadableKeys(encoder.find_unreadable(block)) if block.only_keys else encoder(block)
    except UnreadableKeys as error:
        return done, error.with_traceback(None)


def _refusing(
    encode: Callable[[Iterable[Block]], Iterator[tuple[Block, pa.RecordBatch | UnreadableKeys]]],
    blocks: Iterable[Block],
) -> Iterator[tuple[Block, pa.RecordBatch]]:
    """The rows of each block. Raises DataError if there are `UnreadableKeys`, after reading all blocks, so that it names all of them."""
    places: dict[str, str] = {}
    for block, rows in encode(replace(block, only_keys=bool(places)) for block in blocks):
        if isinstance(rows, UnreadableKeys):
            if not places:
                log.info("messages have keys that are not understood; reading the rest of the input for others")
            places = rows.places | places
        elif not places:
            yield block, rows
    if places:
        shown = sorted(places)[:_SHOWN_KEYS]
        found = ", ".join(f"{key!r} ({places[key]})" for key in shown)
        more = f" and {len(places) - _SHOWN_KEYS} more" if len(places) > _SHOWN_KEYS else ""
        raise DataError(
            f"messages have keys which may change what is trained on and are not understood: {found}{more}. Understood are "
            f"{', '.join((*FLAGS, WEIGHT))}. Rename them to these, or leave them out of training with "
            f"{' '.join(f'--ignore-key {key}' for key in shown)}."
        )


def _template(tokenizer: Tokenizer, settings: ShardSettings) -> ChatTemplate:
    return ChatTemplate(tokenizer, settings.template, settings.record.rendering)


def _sample(inputs: Sequence[Input]) -> list[Input]:
    """The input files on which gigatoken is compared with the tokenizer's own library."""
    return list(inputs[:: -(-len(inputs) // _SAMPLE_FILES)])


def _choose_encoder(settings: ShardSettings, sample: list[Input]) -> tuple[bool, str]:
    """Whether to encode with gigatoken, decided on the first block of each file of `sample`, and the reason for the log.

    Without a sample it is not used: the records are already tokenized, or the tokenizer's own library was asked for.
    """
    if not sample:
        return False, ""
    tokenizer, template = _tokenizer_and_template(settings, True)
    curation = _without_slow_filters(settings.curation)
    sampler = BlockEncoder(tokenizer, template, settings.record, curation, fast=False)
    pieces: list[str] = []
    counts: list[int] = []
    for source in sample:
        for block in islice(read_blocks(source, longest=curation.max_record_bytes), 1):
            rows = sampler.prepare(block, records=_SAMPLE_RECORDS // len(sample))
            counts += rows.counts
            pieces += rows.pieces
    return choose_encoder(tokenizer, pieces, counts)


def _logged(fast: bool, why: str) -> bool:
    if why:
        log.info(why)
    return fast


def _without_slow_filters(curation: Curation) -> Curation:
    """For the sample on which only tokenization is compared."""
    return replace(curation, benchmarks=(), answer_field=None, wrong_answers="drop", near_duplicates=None)


def _remaining_blocks(job: ShardingJob, progress: Progress) -> Iterator[Block]:
    for number in range(progress.source, len(job.inputs)):
        yield from job.blocks(number, progress.lines if number == progress.source else 0)


def _with_progress(
    results: Iterable[tuple[Block, pa.RecordBatch]], bar: tqdm, inputs: list[Input]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(input number, rows) of each block; advances the progress bar."""
    numbers = {source.name: k for k, source in enumerate(inputs)}
    sizes = [source.size for source in inputs]
    for block, rows in results:
        number = numbers[block.source.name]
        bar.update(sum(sizes[:number]) + int(sizes[number] * min(1.0, block.progress)) - bar.n)
        yield number, rows


def progress_bar(inputs: list[Input], show: bool) -> tqdm:
    return tqdm(
        total=sum(source.size for source in inputs),
        unit="B",
        unit_scale=True,
        desc="sharding",
        disable=None if show else True,  # None: only on a terminal
    )


def _manifest(output: Path, progress: Progress, job: ShardingJob) -> dict[str, Any]:
    names = [shard["name"] for shard in progress.shards]
    meta = read_meta(output, names, ["score", "num_tokens", "num_trained", "source"])
    lengths = meta["num_tokens"].to_numpy()
    scores = meta["score"].drop_null().to_numpy()
    if not len(lengths):
        why = ", ".join(f"{reason}: {n}" for reason, n in sorted(progress.reasons.items())) or "the inputs are empty"
        with open(output / DROPPED, encoding="utf-8") as dropped:
            first = dropped.readline().strip()
        raise DataError(
            f"no record was kept ({why}). First entry of {output / DROPPED}: {first or 'none':.500}. Change the inputs or settings and run "
            "the command again."
        )
    checksums = Checksums()
    for shard in progress.shards:
        checksums.update(Checksums(shard["files"], shard.get("blocks", {})))
    for path in [output / DROPPED, *sorted((output / TOKENIZER).iterdir())]:
        checksums.add(str(path.relative_to(output)), checksum_file(path))
    template = job.template
    return {
        "format_version": FORMAT_VERSION,
        "run": job.run_id,
        "tokenizer": {"fingerprint": job.tokenizer.fingerprint, "vocab_size": job.tokenizer.vocab_size},
        "template": {"hash": template.hash, "source": template.source} if template else None,
        "settings": job.manifest_settings,
        "inputs": [{**entry, "records": progress.records.get(entry["name"], 0)} for entry in job.manifest_inputs],
        "counts": {
            "trajectories": len(lengths),
            "tokens": int(lengths.sum(dtype="int64")),
            "trained_tokens": int(meta["num_trained"].to_numpy().sum(dtype="int64")),
            "dropped": sum(progress.reasons.values()),
        },
        "sources": dict(sorted((v["values"], v["counts"]) for v in meta["source"].value_counts().to_pylist())),
        "dropped": dict(sorted(progress.reasons.items())),
        "unchecked": _unchecked(job, progress),
        "unused_keys": dict(sorted(progress.unused_keys.items())),
        "lengths": distribution(lengths),
        "scores": distribution(scores),
        "shards": [{"name": name} for name in names],
        "files": checksums.files,
        **({"blocks": checksums.blocks} if checksums.blocks else {}),
    }


def _unchecked(job: ShardingJob, progress: Progress) -> dict[str, int]:
    """How many problems and kept trajectories the filters could not judge, by what and why."""
    benchmarks = job.manifest_settings["curation"]["benchmarks"]
    problems = {f"problems of {b['name']} without words": b["unchecked"] for b in benchmarks if b["unchecked"]}
    return problems | dict(sorted(progress.unchecked.items()))
