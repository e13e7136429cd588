"""The corpus directory: curated, tokenized, scored trajectories, memory-mapped.

manifest.json                            settings, statistics and the SHA-256 of every file; written last
shard-00000.bin, .idx                    tokens: a Megatron IndexedDataset, one sequence per trajectory
shard-00000.mask.bin, .idx               uint8, 1 where trained on
shard-00000.meta.parquet                 id, score, num_tokens, num_trained, source, file, line, content_hash
tokenizer/                               copy of the tokenizer's files, so that the corpus is self-contained
dropped.jsonl                            every rejected record: file, line, id, reason, detail
reference-<fingerprint>/                 sidecars of reference log-probs (`reference/sidecar.py`)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.data.indexed import IndexedReader, IndexedWriter
from megatron_iwsft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import partial_path, publish, sha256_file, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DROPPED = "dropped.jsonl"
TOKENIZER = "tokenizer"
_ROW_GROUP = 1 << 16  # rows

_META = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float64()),
        ("num_tokens", pa.int32()),
        ("num_trained", pa.int32()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content_hash", pa.binary(32)),
    ]
)

# Hashes do not compress.
_COMPRESSION = {name: "none" if name == "content_hash" else "zstd" for name in _META.names}


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


class ShardWriter:
    """Writes one shard. Its files get their final names on `close`, the metadata last."""

    def __init__(self, directory: Path, index: int, token_dtype: np.dtype) -> None:
        self.name = shard_name(index)
        self._tokens = IndexedWriter(directory / self.name, token_dtype)
        self._masks = IndexedWriter(directory / f"{self.name}.mask", np.dtype(np.uint8))
        self._meta_path = directory / f"{self.name}.meta.parquet"
        self._meta_file = pq.ParquetWriter(
            partial_path(self._meta_path), _META, compression=_COMPRESSION, use_dictionary=["source", "file"]
        )
        self._meta: list[pa.RecordBatch] = []
        self.num_tokens = 0

    def append(self, rows: pa.RecordBatch, file: str) -> None:
        """Add trajectories: rows with the columns of `encode.row_schema`, none of them dropped."""
        lengths = rows["tokens"].value_lengths().to_numpy()
        self._tokens.append_many(rows["tokens"].flatten().to_numpy(), lengths)
        self._masks.append_many(rows["mask"].flatten().to_numpy(), lengths)
        columns = {name: rows[name] for name in ("id", "score", "num_trained", "source", "line", "content_hash")}
        columns["num_tokens"] = pa.array(lengths.astype(np.int32))
        columns["file"] = pa.repeat(pa.scalar(file, pa.string()), rows.num_rows)
        self._meta.append(pa.record_batch([columns[name] for name in _META.names], schema=_META))
        self._write_meta(_ROW_GROUP)
        self.num_tokens += int(lengths.sum())

    def _write_meta(self, group: int) -> None:
        """Write all complete row groups of `group` rows, so that their boundaries do not depend on how the rows arrive."""
        buffered = sum(batch.num_rows for batch in self._meta)
        if buffered < group:
            return
        table = pa.Table.from_batches(self._meta, _META).combine_chunks()
        for start in range(0, buffered - group + 1, group):
            self._meta_file.write_table(table.slice(start, group))
        self._meta = table.slice(buffered - buffered % group).to_batches()

    def close(self) -> dict[str, str]:
        """Finish the shard. Returns file name → SHA-256."""
        hashes = self._tokens.close() | self._masks.close()
        self._write_meta(max(1, sum(batch.num_rows for batch in self._meta)))
        self._meta_file.close()
        publish(partial_path(self._meta_path), self._meta_path)
        return hashes | {self._meta_path.name: sha256_file(self._meta_path)}

    def abandon(self) -> None:
        """Close the files, leaving them under their temporary names."""
        self._tokens.abandon()
        self._masks.abandon()
        self._meta_file.close()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a corpus or of a sidecar, atomically."""
    write_json(directory / MANIFEST, manifest, sort_keys=True, single_writer=True)


def distribution(values: np.ndarray) -> dict[str, Any] | None:
    """Mean and percentiles (0 and 100 are minimum and maximum) of `values`, for the manifest; None if `values` is empty."""
    if not len(values):
        return None
    quantiles = (0, 5, 25, 50, 75, 95, 100)
    return {
        "mean": float(np.mean(values, dtype=np.float64)),
        "percentiles": {str(q): float(v) for q, v in zip(quantiles, np.percentile(values, quantiles), strict=True)},
    }


@dataclass(frozen=True)
class Corpus:
    """An open corpus. Its n = len(corpus) trajectories are numbered across all shards, in order.

    lengths      int32   [n]  tokens per trajectory
    num_trained  int32   [n]  |M_i|, trained tokens per trajectory
    scores       float64 [n]  NaN where a trajectory has no score
    fingerprint  SHA-256 of the manifest, which contains that of every file
    """

    directory: Path
    manifest: dict[str, Any]
    fingerprint: str
    lengths: np.ndarray
    num_trained: np.ndarray
    scores: np.ndarray
    _tokens: list[IndexedReader]
    _masks: list[IndexedReader]
    _starts: np.ndarray

    @staticmethod
    def open(directory: str | Path) -> Corpus:
        """Open a corpus directory. Raises DataError if it is missing, unfinished, damaged or of an unsupported format version."""
        directory = Path(directory)
        manifest, fingerprint = _read_manifest(directory)
        names = [shard["name"] for shard in manifest["shards"]]
        tokens = [IndexedReader(directory / name) for name in names]
        masks = [IndexedReader(directory / f"{name}.mask") for name in names]
        meta = read_meta(directory, names, ["score", "num_tokens", "num_trained"])
        for name, t, m in zip(names, tokens, masks, strict=True):
            if not np.array_equal(t.lengths, m.lengths):
                raise DataError(f"{directory / name}: tokens and masks differ in length. Shard the records again.")
        sizes = [len(t) for t in tokens]
        if sum(sizes) != meta.num_rows:
            raise DataError(
                f"{directory}: {sum(sizes)} sequences but {meta.num_rows} rows of metadata. Shard the records again."
            )
        return Corpus(
            directory=directory,
            manifest=manifest,
            fingerprint=fingerprint,
            lengths=meta["num_tokens"].to_numpy(),
            num_trained=meta["num_trained"].to_numpy(),
            scores=meta["score"].cast(pa.float64()).fill_null(float("nan")).to_numpy(),
            _tokens=tokens,
            _masks=masks,
            _starts=np.cumsum([0, *sizes]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shards(self) -> list[str]:
        return [shard["name"] for shard in self.manifest["shards"]]

    def locate(self, i: int) -> tuple[int, int]:
        """(shard, index within the shard) of trajectory i."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return shard, i - int(self._starts[shard])

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of trajectory i, uint16 or int32 [lengths[i]], a read-only view of the file."""
        shard, k = self.locate(i)
        return self._tokens[shard][k]

    def mask(self, i: int) -> np.ndarray:
        """Loss mask of trajectory i, uint8 [lengths[i]], 1 where trained on; a read-only view of the file."""
        shard, k = self.locate(i)
        return self._masks[shard][k]

    def shard_lengths(self, shard: int) -> np.ndarray:
        """Tokens per trajectory of a shard, int32 [sequences in the shard]."""
        return self._tokens[shard].lengths

    def meta(self, columns: list[str] | None = None) -> pa.Table:
        return read_meta(self.directory, self.shards, columns)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory / TOKENIZER)

    def shard_meta(self, shard: str, columns: list[str]) -> pa.Table:
        return read_meta(self.directory, [shard], columns)

    def verify(self) -> list[str]:
        """See `verify_files`."""
        return verify_files(self.directory)


def verify_files(directory: Path) -> list[str]:
    """Recompute the SHA-256 of every file of a corpus. Returns one message per file that is missing or has changed."""
    out = []
    manifest, _ = _read_manifest(directory)
    for name, expected in sorted(manifest["files"].items()):
        path = directory / name
        if not path.exists():
            out.append(f"{path} is missing")
        elif sha256_file(path) != expected:
            out.append(f"{path} has changed since the manifest was written")
    return out


def _read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """(manifest, SHA-256 of its file)."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DataError(f"there is no corpus at {directory}. Create one with `iwsft shard`.")
    if not path.exists():
        raise DataError(
            f"{directory} has no {MANIFEST}: sharding was interrupted. Run the same `iwsft shard` command again to finish it."
        )
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged. Shard the records again.") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this version of iwsft reads only version {FORMAT_VERSION}. Shard the records again."
        )
    return manifest, hashlib.sha256(content).hexdigest()


def read_meta(directory: Path, names: list[str], columns: list[str] | None) -> pa.Table:
    """The metadata of shards `names`, concatenated. Raises DataError if a file is missing or damaged."""
    tables = []
    for name in names:
        path = directory / f"{name}.meta.parquet"
        try:
            tables.append(pq.read_table(path, columns=columns))
        except FileNotFoundError:
            raise DataError(f"{path} is missing. Shard the records again.") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is damaged: {error}. Shard the records again.") from None
    if not tables:
        return _META.empty_table().select(columns or _META.names)
    return pa.concat_tables(tables)
