"""Build a corpus directory from records: the pipeline of reading, encoding and writing.

The main process reads blocks of input, worker processes encode them as rows (`encode.py`), and the main process writes the rows in
input order (`corpus_writer.py`). So the corpus does not depend on the number of workers, and an interrupted run continues after its
last finished shard. A job array encodes file by file (`job_array.py`); merging its parts is only the last stage.
"""

from __future__ import annotations

import contextlib
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
from megatron_iwsft.data.corpus import DROPPED, TOKENIZER, read_meta
from megatron_iwsft.data.indexed import token_dtype
from megatron_iwsft.data.manifest import FORMAT_VERSION, MANIFEST, check_manifest, distribution, write_manifest
from megatron_iwsft.data.prepare.corpus_writer import CorpusWriter, Progress, remove_progress, resume
from megatron_iwsft.data.prepare.encode import BlockEncoder, row_schema
from megatron_iwsft.data.prepare.fast_encoding import choose_encoder
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.messages import Dropped
from megatron_iwsft.data.prepare.readers import Block, Input, find_inputs, fingerprint, read_blocks, rows_of
from megatron_iwsft.data.prepare.records import RecordFormat, parse
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE, Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.json_files import read_json
from megatron_iwsft.utils.locks import exclusive

log = logging.getLogger(__name__)

_SAMPLE_FILES, _SAMPLE_RECORDS = 8, 1000


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
        self.settings = settings
        settings.curation.check_libraries()
        self.tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        self.template = _template(self.tokenizer, settings) if _needs_template(self.inputs) else None
        self.manifest_settings = {
            "template": settings.template or "tokenizer",
            "template_hash": self.template.hash if self.template else None,
            "record": asdict(settings.record),
            "curation": settings.curation.manifest_entry(),
            "shard_tokens": settings.shard_tokens,
        }
        self.manifest_inputs = [{"name": i.name, "bytes": i.size, "sha256": fingerprint(i)} for i in self.inputs]
        content = {**self.manifest_settings, "tokenizer": self.tokenizer.fingerprint, "inputs": self.manifest_inputs}
        self.run_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def row_schema(self) -> pa.Schema:
        """Of the rows that the workers return."""
        near = self.settings.curation.near_duplicates is not None
        return row_schema(token_dtype(self.tokenizer.vocab_size), signatures=near)

    def use_gigatoken(self, encoder: Literal["auto", "own"]) -> bool:
        """Whether to encode with gigatoken, decided on a sample of the inputs; the decision is logged."""
        if self.template is None:
            return False  # the records are already tokenized
        if encoder == "own":
            log.info("encoding with the tokenizer's own library, as requested")
            return False
        curation = _without_slow_filters(self.settings.curation)
        sampler = BlockEncoder(self.tokenizer, self.template, self.settings.record, curation, fast=False)
        pieces: list[str] = []
        counts: list[int] = []
        chosen = self.inputs[:: -(-len(self.inputs) // _SAMPLE_FILES)]
        for source in chosen:
            for block in islice(read_blocks(source), 1):
                rows = sampler.prepare(block)
                some = rows.counts[: _SAMPLE_RECORDS // len(chosen)]
                counts += some
                pieces += rows.pieces[: sum(some)]
        if unused := sampler.reader.messages.unused:
            log.info(f"keys of messages that are not used: {', '.join(sorted(unused))}")
        fast, why = choose_encoder(self.tokenizer, pieces, counts)
        log.info(why)
        return fast


def shard_corpus(
    inputs: Sequence[str | Path],
    output: Path,
    settings: ShardSettings,
    *,
    workers: int = 1,
    encoder: Literal["auto", "own"] = "auto",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build the corpus directory `output` from input files or glob patterns, or finish building it. Returns the manifest.

    `encoder`: "auto" uses gigatoken if it gives the same ids, "own" always the tokenizer's own library. A finished corpus with the
    same inputs and settings is not changed. Raises DataError if an input is missing or damaged, if the tokenizer or template is
    unsuitable, or if `output` contains anything but this corpus.
    """
    job = ShardingJob(inputs, settings)
    finished = finished_manifest(output, job.run_id)
    if finished is not None:
        log.info(f"{output} is already complete for these inputs and settings")
        return finished
    with report_disk_errors(output), exclusive_output(output):
        finished = finished_manifest(output, job.run_id)  # by a command that held the lock until now
        if finished is not None:
            return finished
        progress = resume(output, job.run_id, inputs=len(job.inputs))
        if progress.shards:
            log.info(f"resuming {output} after {len(progress.shards)} finished shards")
        with progress_bar(job.inputs, show_progress) as bar, worker_pool(job, workers, encoder) as mapper:
            blocks = mapper(_remaining_blocks(job.inputs, progress))
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


@contextmanager
def worker_pool(
    job: ShardingJob, workers: int, encoder: Literal["auto", "own"]
) -> Iterator[Callable[[Iterable[Block]], Iterator[tuple[Block, pa.RecordBatch]]]]:
    """Yields a function that maps blocks to (block without payload, rows), in order, with at most 2·workers blocks in flight."""
    encode = partial(_encode_block, job.settings, job.template is not None)
    if workers <= 1:
        yield partial(map, partial(encode, job.use_gigatoken(encoder)))
        return
    # One thread per library in each worker: parallelism comes from the processes.
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "false" if name.startswith("TOK") else "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        for _ in range(workers):
            pool.submit(os.getpid)  # the workers start while the tokenizer is checked here
        run = partial(encode, job.use_gigatoken(encoder))

        def map_in_order(blocks: Iterable[Block]) -> Iterator[tuple[Block, pa.RecordBatch]]:
            waiting = iter(blocks)
            in_flight = deque(pool.submit(run, block) for block in islice(waiting, 2 * workers))
            try:
                while in_flight:
                    result = in_flight.popleft().result()
                    in_flight.extend(pool.submit(run, block) for block in islice(waiting, 1))
                    yield result
            except BrokenProcessPool:
                raise DataError(
                    "a worker process exited unexpectedly (probably out of memory; check dmesg). Run the same command again, with fewer "
                    "--workers, to continue after the last finished shard."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

        yield map_in_order


def _start_worker() -> None:
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
def _block_encoder(settings: ShardSettings, with_template: bool, fast: bool) -> BlockEncoder:
    """This process's encoder, created at its first block."""
    tokenizer = load_tokenizer(settings.tokenizer)
    template = _template(tokenizer, settings) if with_template else None
    return BlockEncoder(tokenizer, template, settings.record, settings.curation, fast=fast)


def _encode_block(
    settings: ShardSettings, with_template: bool, fast: bool, block: Block
) -> tuple[Block, pa.RecordBatch]:
    return replace(block, payload=b""), _block_encoder(settings, with_template, fast)(block)


def _template(tokenizer: Tokenizer, settings: ShardSettings) -> ChatTemplate:
    return ChatTemplate(tokenizer, settings.template, settings.record.rendering)


def _without_slow_filters(curation: Curation) -> Curation:
    """For the sample on which only tokenization is compared."""
    return replace(curation, benchmarks=(), answer_field=None, wrong_answers="drop", near_duplicates=None)


def _remaining_blocks(inputs: list[Input], progress: Progress) -> Iterator[Block]:
    for number in range(progress.source, len(inputs)):
        yield from read_blocks(inputs[number], progress.lines if number == progress.source else 0)


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


def _needs_template(inputs: list[Input]) -> bool:
    """Whether records have text to render. The first record that can be read decides: all records should be of one kind."""
    for source in inputs:
        for block in read_blocks(source):
            content = block.content()
            lines = content.split(b"\n") if isinstance(content, bytes) else rows_of(content)
            for line in lines:
                try:
                    record = parse(line) if isinstance(line, bytes) else line
                except Dropped:
                    continue
                return not (isinstance(record, dict) and "input_ids" in record)
    return True


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
            f"no record was kept ({why}). First entry of {output / DROPPED}: {first or 'none':.500}. Remove {output} before "
            "trying again."
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
        "inputs": job.manifest_inputs,
        "counts": {
            "trajectories": len(lengths),
            "tokens": int(lengths.sum(dtype="int64")),
            "trained_tokens": int(meta["num_trained"].to_numpy().sum(dtype="int64")),
            "dropped": sum(progress.reasons.values()),
        },
        "sources": dict(sorted((v["values"], v["counts"]) for v in meta["source"].value_counts().to_pylist())),
        "dropped": dict(sorted(progress.reasons.items())),
        "lengths": distribution(lengths),
        "scores": distribution(scores),
        "shards": [{"name": name} for name in names],
        "files": checksums.files,
        **({"blocks": checksums.blocks} if checksums.blocks else {}),
    }
