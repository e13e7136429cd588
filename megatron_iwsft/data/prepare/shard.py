"""Records → corpus directory.

One process reads blocks of input, worker processes turn them into rows (`encode.py`), and one process takes the rows in input order
(`ordered.py`). So the result does not depend on the number of workers, and an interrupted run continues after its last
finished shard. A job array does the middle stage file by file (`parts.py`); merging its parts is the last stage alone.
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

from megatron_iwsft.data import corpus as layout
from megatron_iwsft.data.chat_template import ChatTemplate
from megatron_iwsft.data.indexed import token_dtype
from megatron_iwsft.data.prepare.corpus_writer import OrderedWriter, Progress, forget_progress, resume
from megatron_iwsft.data.prepare.encode import BlockEncoder
from megatron_iwsft.data.prepare.fast_encoding import choose_encoder
from megatron_iwsft.data.prepare.filters import Curation
from megatron_iwsft.data.prepare.readers import Block, Input, find_inputs, fingerprint, read_blocks, rows_of
from megatron_iwsft.data.prepare.records import Dropped, RecordFormat, parse
from megatron_iwsft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError

log = logging.getLogger(__name__)

_SAMPLE_FILES, _SAMPLE_RECORDS = 8, 1000


@dataclass(frozen=True)
class ShardSettings:
    """Everything that decides the content of a corpus, beside the input files."""

    tokenizer: str
    template: str | None = None
    record: RecordFormat = field(default_factory=RecordFormat)
    shard_tokens: int = 100_000_000
    curation: Curation = field(default_factory=Curation)


class Job:
    """What a run of sharding works from: inputs, tokenizer, template, and `run`, a hash of all that decides the corpus."""

    def __init__(self, inputs: Sequence[str | Path], settings: ShardSettings) -> None:
        self.inputs = find_inputs(inputs)
        self.settings = settings
        settings.curation.check_libraries()
        self.tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        self.template = _template(self.tokenizer, settings) if _needs_template(self.inputs) else None
        self.described = {
            "template": settings.template or "tokenizer",
            "template_hash": self.template.hash if self.template else None,
            "record": asdict(settings.record),
            "curation": settings.curation.described(),
            "shard_tokens": settings.shard_tokens,
        }
        self.files = [{"name": i.name, "bytes": i.size, "sha256": fingerprint(i)} for i in self.inputs]
        content = {**self.described, "tokenizer": self.tokenizer.fingerprint, "inputs": self.files}
        self.run = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def choose_fast(self, encoder: Literal["auto", "own"]) -> bool:
        """Whether to encode with gigatoken; says so in the log."""
        if self.template is None:
            return False  # the records are already tokenized
        if encoder == "own":
            log.info("encoding with the tokenizer's own library, as asked")
            return False
        sampler = BlockEncoder(self.tokenizer, self.template, self.settings.record, _lenient(self.settings), fast=False)
        pieces: list[str] = []
        counts: list[int] = []
        chosen = self.inputs[:: -(-len(self.inputs) // _SAMPLE_FILES)]
        for source in chosen:
            for block in islice(read_blocks(source), 1):
                rows = sampler.prepare(block)
                some = rows.counts[: _SAMPLE_RECORDS // len(chosen)]
                counts += some
                pieces += rows.pieces[: sum(some)]
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
    """Make (or finish making) the corpus directory `output` from input files or glob patterns; returns its manifest.

    Raises DataError for missing or damaged inputs, a tokenizer or template that does not serve, or an output that another run
    with other settings left unfinished. A finished corpus with the same inputs and settings is left as it is.
    """
    job = Job(inputs, settings)
    finished = finished_manifest(output, job.run)
    if finished is not None:
        log.info(f"{output} is complete; it was made from these inputs with these settings")
        return finished
    with told_if_disk_fails(output):
        output.mkdir(parents=True, exist_ok=True)
        progress = resume(output, job.run)
        if progress.shards:
            log.info(f"{output} was begun; continuing after its {len(progress.shards)} finished shards")
        with progress_bar(job.inputs, show_progress) as bar, worker_pool(job, workers, encoder) as mapper:
            blocks = mapper(_all_blocks(job.inputs, progress))
            return write_corpus(job, output, progress, _watched(blocks, bar, job.inputs), bar)


def write_corpus(
    job: Job, output: Path, progress: Progress, blocks: Iterable[tuple[int, pa.RecordBatch]], bar: tqdm
) -> dict[str, Any]:
    """The last stage: (input number, rows) of every block in order → shards, manifest."""
    settings = job.settings
    dtype = token_dtype(job.tokenizer.vocab_size)
    with OrderedWriter(output, progress, dtype, settings.curation, settings.shard_tokens) as writer:
        for source, rows in blocks:
            writer.take(source, job.inputs[source].name, rows)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{writer.tokens / max(elapsed, 1e-9) / 1e6:.2f} M tokens/s", refresh=False)
        writer.finish()
    job.tokenizer.copy_to(output / layout.TOKENIZER)
    if job.template is not None and settings.template is not None:
        (output / layout.TOKENIZER / "chat_template.jinja").write_text(job.template.source, encoding="utf-8")
    manifest = _manifest(output, progress, job)
    layout.write_manifest(output, manifest)
    forget_progress(output, [shard["name"] for shard in progress.shards])
    return manifest


def finished_manifest(output: Path, run: str) -> dict[str, Any] | None:
    """The manifest of run `run` if it is finished. Raises DataError if another run's is there."""
    path = output / layout.MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("run") == run:
        return manifest
    raise DataError(
        f"{output} already holds a corpus made from other inputs or settings. Choose another --output, or remove it."
    )


@contextmanager
def told_if_disk_fails(output: Path) -> Iterator[None]:
    """An operating-system error while writing becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the corpus at {output}: {error.strerror or error} ({error.filename or output}). Nothing that is there "
            "counts as a corpus yet; mend it and run the same command to continue."
        ) from None


@contextmanager
def worker_pool(
    job: Job, workers: int, encoder: Literal["auto", "own"]
) -> Iterator[Callable[[Iterable[Block]], Iterator[tuple[Block, pa.RecordBatch]]]]:
    """A map from blocks to (block without its payload, rows) that keeps the order, with few blocks in flight."""
    choose = partial(_encode_block, job.settings, job.template is not None)
    if workers <= 1:
        yield partial(map, partial(choose, job.choose_fast(encoder)))
        return
    # Each worker runs one thread of each library: parallelism comes from the processes.
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "false" if name.startswith("TOK") else "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        for _ in range(workers):
            pool.submit(os.getpid)  # they start while the tokenizer is checked here
        run = partial(choose, job.choose_fast(encoder))

        def ordered(blocks: Iterable[Block]) -> Iterator[tuple[Block, pa.RecordBatch]]:
            waiting = iter(blocks)
            flying = deque(pool.submit(run, block) for block in islice(waiting, 2 * workers))
            try:
                while flying:
                    result = flying.popleft().result()
                    flying.extend(pool.submit(run, block) for block in islice(waiting, 1))
                    yield result
            except BrokenProcessPool:
                raise DataError(
                    "a worker process was killed, probably for want of memory. Run the same command again, with fewer --workers, to "
                    "continue after the last finished shard."
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

        yield ordered


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()
    gc.set_threshold(
        100_000, 50, 50
    )  # a block's many small objects live until its end: looking for cycles among them is vain


def _end_with_parent() -> None:
    """A pool's workers wait for work for ever if the process that they work for was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)
def _block_encoder(settings: ShardSettings, with_template: bool, fast: bool) -> BlockEncoder:
    """This process's encoder, made at its first block."""
    tokenizer = load_tokenizer(settings.tokenizer)
    template = _template(tokenizer, settings) if with_template else None
    return BlockEncoder(tokenizer, template, settings.record, settings.curation, fast=fast)


def _encode_block(
    settings: ShardSettings, with_template: bool, fast: bool, block: Block
) -> tuple[Block, pa.RecordBatch]:
    return replace(block, payload=b""), _block_encoder(settings, with_template, fast)(block)


def _template(tokenizer: Tokenizer, settings: ShardSettings) -> ChatTemplate:
    return ChatTemplate(tokenizer, settings.template, settings.record.rendering)


def _lenient(settings: ShardSettings) -> Curation:
    """No slow checks: for the sample that only tokenization is compared on."""
    return replace(settings.curation, benchmarks=(), answer_field=None, wrong_answers="drop", near_duplicates=None)


def _all_blocks(inputs: list[Input], progress: Progress) -> Iterator[Block]:
    for number in range(progress.source, len(inputs)):
        yield from read_blocks(inputs[number], progress.lines if number == progress.source else 0)


def _watched(
    results: Iterable[tuple[Block, pa.RecordBatch]], bar: tqdm, inputs: list[Input]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(input number, rows), moving the bar."""
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
    """Whether any record has text to render: decided by the first one that can be read, since a corpus is of one kind."""
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


def _manifest(output: Path, progress: Progress, job: Job) -> dict[str, Any]:
    names = [shard["name"] for shard in progress.shards]
    meta = layout.read_meta(output, names, ["score", "num_tokens", "num_trained", "source"])
    lengths = meta["num_tokens"].to_numpy()
    scores = meta["score"].drop_null().to_numpy()
    if not len(lengths):
        why = ", ".join(f"{reason}: {n}" for reason, n in sorted(progress.reasons.items())) or "the inputs are empty"
        with open(output / layout.DROPPED, encoding="utf-8") as dropped:
            first = dropped.readline().strip()
        raise DataError(
            f"no trajectory was taken ({why}). The first in {output / layout.DROPPED}: {first or 'none':.500}. Remove {output} before "
            "trying again."
        )
    files = {name: digest for shard in progress.shards for name, digest in shard["files"].items()}
    for path in [output / layout.DROPPED, *sorted((output / layout.TOKENIZER).iterdir())]:
        files[str(path.relative_to(output))] = layout.file_hash(path)
    template = job.template
    return {
        "format_version": layout.FORMAT_VERSION,
        "run": job.run,
        "tokenizer": {"fingerprint": job.tokenizer.fingerprint, "vocab_size": job.tokenizer.vocab_size},
        "template": {"hash": template.hash, "source": template.source} if template else None,
        "settings": job.described,
        "inputs": job.files,
        "counts": {
            "trajectories": len(lengths),
            "tokens": int(lengths.sum(dtype="int64")),
            "trained_tokens": int(meta["num_trained"].to_numpy().sum(dtype="int64")),
            "dropped": sum(progress.reasons.values()),
        },
        "sources": dict(sorted((v["values"], v["counts"]) for v in meta["source"].value_counts().to_pylist())),
        "dropped": dict(sorted(progress.reasons.items())),
        "lengths": layout.distribution(lengths),
        "scores": layout.distribution(scores),
        "shards": [{"name": name} for name in names],
        "files": files,
    }
