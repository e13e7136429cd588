"""The corpus directory: curated, tokenized, scored trajectories.

manifest.json                            settings, statistics and the SHA-256 of every file; written last
shard-00000.bin, .idx                    tokens: a Megatron IndexedDataset, one sequence per trajectory
shard-00000.mask.bin, .idx               uint8, 1 where trained on
shard-00000.meta.parquet                 id, score, num_tokens, num_trained, turn_weights, source, file, line, content_hash
tokenizer/                               copy of the tokenizer's files, so that the corpus is self-contained
dropped.jsonl                            every rejected record: file, line, id, reason, detail
reference-<fingerprint>/                 sidecars of reference log-probs (`reference/sidecar.py`)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.data.checksums import Checksums, Piece, checksum_file, damaged_files, pieces_of
from megatron_iwsft.data.corpus_index import CorpusIndex
from megatron_iwsft.data.indexed import IndexedReader, IndexedWriter, SequenceIndex, check_own_file
from megatron_iwsft.data.manifest import read_manifest, shard_files
from megatron_iwsft.data.metadata import META, Sources, meta_path, read_meta
from megatron_iwsft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import partial_path, publish

Verify = Literal["full", "sample", "none"]
DROPPED = "dropped.jsonl"
TOKENIZER = "tokenizer"
_ROW_GROUP = 1 << 16  # rows
_SAMPLED_PIECES = 64  # of at most 64 MiB each
_AGAIN = "Shard the records again."
_CHANGED = "has changed since the manifest was written"

# Hashes do not compress.
_COMPRESSION = {name: "none" if name == "content_hash" else "zstd" for name in META.names}


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


class ShardWriter:
    """Writes one shard. Its files get their final names on `close`, the metadata last."""

    def __init__(self, directory: Path, index: int, token_dtype: np.dtype) -> None:
        self.name, self._directory = shard_name(index), directory
        self._tokens = IndexedWriter(directory / self.name, token_dtype)
        self._masks = IndexedWriter(directory / f"{self.name}.mask", np.dtype(np.uint8))
        self._meta_path = meta_path(directory, self.name)
        self._meta_file = pq.ParquetWriter(
            partial_path(self._meta_path), META, compression=_COMPRESSION, use_dictionary=["source", "file"]
        )
        self._meta: list[pa.RecordBatch] = []
        self.num_tokens = 0

    def append(self, rows: pa.RecordBatch, file: str) -> None:
        """Add trajectories: rows with the columns of `encode.row_schema`, none of them dropped."""
        lengths = rows["tokens"].value_lengths().to_numpy()
        self._tokens.append_many(rows["tokens"].flatten().to_numpy(), lengths)
        self._masks.append_many(rows["mask"].flatten().to_numpy(), lengths)
        columns = {
            name: rows[name]
            for name in ("id", "score", "num_trained", "turn_weights", "source", "line", "content_hash")
        }
        columns["num_tokens"] = pa.array(lengths.astype(np.int32))
        columns["file"] = pa.repeat(pa.scalar(file, pa.string()), rows.num_rows)
        self._meta.append(pa.record_batch([columns[name] for name in META.names], schema=META))
        self._write_meta(_ROW_GROUP)
        self.num_tokens += int(lengths.sum())

    def _write_meta(self, group: int) -> None:
        """Write all complete row groups of `group` rows, so that their boundaries do not depend on how the rows arrive."""
        buffered = sum(batch.num_rows for batch in self._meta)
        if buffered < group:
            return
        table = pa.Table.from_batches(self._meta, META).combine_chunks()
        for start in range(0, buffered - group + 1, group):
            self._meta_file.write_table(table.slice(start, group))
        self._meta = table.slice(buffered - buffered % group).to_batches()

    def close(self) -> Checksums:
        """Finish the shard. Returns the checksums of its files."""
        checksums = self._tokens.close()
        checksums.update(self._masks.close())
        self._write_meta(max(1, sum(batch.num_rows for batch in self._meta)))
        self._meta_file.close()
        publish(partial_path(self._meta_path), self._meta_path)
        checksums.add(self._meta_path.name, checksum_file(self._meta_path))
        return checksums

    def abandon(self) -> None:
        """Remove the unfinished files."""
        self._tokens.abandon()
        self._masks.abandon()
        with contextlib.suppress(OSError):  # on a full disk
            self._meta_file.close()
        for name in shard_files(self.name):
            (self._directory / name).unlink(missing_ok=True)
            partial_path(self._directory / name).unlink(missing_ok=True)


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
    index: CorpusIndex
    _tokens: list[IndexedReader]
    _masks: list[IndexedReader]
    _starts: np.ndarray

    @staticmethod
    def open(directory: str | Path) -> Corpus:
        """Open a corpus directory. Raises DataError if it is missing, unfinished, damaged or of an unsupported format version.

        Reads the manifest, the indices and the metadata, those two once per node; `damage` reads the rest.
        """
        directory = Path(directory)
        manifest, fingerprint = read_manifest(directory)
        names = [shard["name"] for shard in manifest["shards"]]
        index = CorpusIndex.open(directory, names, fingerprint=fingerprint)
        starts = np.cumsum([0, *index.sizes])
        parts = [
            SequenceIndex(index.lengths[first:end], index.starts[first:end])
            for first, end in itertools.pairwise(starts.tolist())
        ]
        by_name = dict(zip(names, parts, strict=True))
        return Corpus(
            directory=directory,
            manifest=manifest,
            fingerprint=fingerprint,
            index=index,
            _tokens=[IndexedReader(directory / n, (np.uint16, np.int32), index=i) for n, i in by_name.items()],
            _masks=[IndexedReader(directory / f"{n}.mask", (np.uint8,), index=i) for n, i in by_name.items()],
            _starts=starts,
        )

    @property
    def lengths(self) -> np.ndarray:
        return self.index.lengths

    @property
    def num_trained(self) -> np.ndarray:
        return self.index.num_trained

    @property
    def scores(self) -> np.ndarray:
        return self.index.scores

    @property
    def has_turn_weights(self) -> bool:
        """Whether any trajectory has turns of different weights."""
        return bool(len(self.index.weighted))

    def sources(self) -> Sources:
        return Sources.joined([Sources.of(self.shard_meta(name, ["source"])["source"]) for name in self.shards])

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
        """Token ids of trajectory i, uint16 or int32 [lengths[i]], read-only. Raises DataError if one is not in the vocabulary."""
        shard, k = self.locate(i)
        return self._checked(self._tokens[shard][k], shard, is_mask=False)

    def mask(self, i: int) -> np.ndarray:
        """Loss mask of trajectory i, uint8 [lengths[i]], 1 where trained on; read-only. Raises DataError for values beyond 1."""
        shard, k = self.locate(i)
        return self._checked(self._masks[shard][k], shard, is_mask=True)

    def token_weights(self, i: int) -> np.ndarray | None:
        """How much each token of trajectory i is trained on, as its record's messages say, float32 [lengths[i]]; None if all alike."""
        weights = self.index.turn_weights(i)
        if weights is None:
            return None
        mask = self.mask(i)
        run = np.cumsum(np.diff(mask, prepend=np.uint8(0)) == 1)  # from 1 on
        if run[-1] > len(weights):
            raise DataError(f"{self.directory} is damaged: trajectory {i} has fewer weights than turns. {_AGAIN}")
        return np.where(mask == 1, np.concatenate([np.zeros(1, np.float32), weights])[run], np.float32(0))

    def _checked(self, values: np.ndarray, shard: int, *, is_mask: bool) -> np.ndarray:
        complaint = self._values_complaint(values, is_mask=is_mask)
        if complaint:
            reader = (self._masks if is_mask else self._tokens)[shard]
            raise DataError(f"{reader.path} {complaint}. {_AGAIN}")
        return values

    def _values_complaint(self, values: np.ndarray, *, is_mask: bool) -> str | None:
        """What is wrong with the values of a part of a file, if anything."""
        if is_mask and len(values) and values.max() > 1:
            return f"is damaged: the mask has the value {values.max()}"
        size = self.manifest["tokenizer"]["vocab_size"]
        if not is_mask and len(values) and not 0 <= values.min() <= values.max() < size:
            return f"is damaged: ids go from {values.min()} to {values.max()}, but its tokenizer has {size} tokens"
        return None

    def shard_index(self, shard: int) -> SequenceIndex:
        """Where the tokens of each trajectory of a shard are."""
        return SequenceIndex(self._tokens[shard].lengths, self._tokens[shard].starts)

    def meta(self, columns: list[str] | None = None) -> pa.Table:
        return read_meta(self.directory, self.shards, columns)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory / TOKENIZER)

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files. Raises DataError if one is not a regular file."""
        files = [self.directory / name for name in sorted(self.manifest["files"]) if name.startswith(f"{TOKENIZER}/")]
        for file in files:
            check_own_file(file)
        return files

    def shard_meta(self, shard: str, columns: list[str]) -> pa.Table:
        return read_meta(self.directory, [shard], columns)

    def pieces(self, verify: Verify = "full", *, share: int = 0, shares: int = 1, seed: int = 0) -> list[Piece]:
        """Share number `share` of `shares` of what is checked: each rank checks one.

        full: every file; sample: 64 pieces of at most 64 MiB, chosen by `seed` (of a corpus without checksums of blocks, 64 files);
        none: nothing.
        """
        if verify == "none":
            return []
        found = pieces_of(self.manifest["files"], self.manifest.get("blocks", {}))
        if verify == "sample" and len(found) > _SAMPLED_PIECES:
            chosen = np.random.default_rng(seed).choice(len(found), _SAMPLED_PIECES, replace=False)
            found = [found[k] for k in np.sort(chosen).tolist()]
        return found[share::shares]

    def damage(self, pieces: Sequence[Piece] | None = None, *, show_progress: bool = False) -> list[str]:
        """One complaint per damaged file of `pieces` (default: of all): its SHA-256 is compared with the manifest's.

        In what is read, token ids must be in the vocabulary, masks 0 or 1, and each trajectory must have as many trained tokens as its
        metadata says.
        """
        contents = {reader.path.name: (shard, False) for shard, reader in enumerate(self._tokens)}
        contents |= {reader.path.name: (shard, True) for shard, reader in enumerate(self._masks)}

        def look_at(piece: Piece, start: int, data: bytes) -> str | None:
            shard, is_mask = contents.get(piece.name, (-1, False))
            return None if shard < 0 else self._part_complaint(shard, start, data, is_mask=is_mask)

        return damaged_files(
            self.directory,
            self.pieces() if pieces is None else pieces,
            changed=_CHANGED,
            look_at=look_at,
            show_progress=show_progress,
        )

    def _part_complaint(self, shard: int, start: int, data: bytes, *, is_mask: bool) -> str | None:
        """`_values_complaint` of a part of a shard's .bin or .mask.bin, which starts at byte `start`."""
        reader = (self._masks if is_mask else self._tokens)[shard]
        if len(data) % reader.dtype.itemsize:
            return "is truncated"
        values = np.frombuffer(data, reader.dtype)
        complaint = self._values_complaint(values, is_mask=is_mask)
        if complaint or not is_mask:
            return complaint
        # Trajectories that lie completely within this part.
        first, end = (
            np.searchsorted(reader.starts, start),
            np.searchsorted(reader.starts + reader.lengths, start + len(data), side="right"),
        )
        if end <= first:
            return None
        starts = reader.starts[first:end] - start
        trained = np.add.reduceat(values[: starts[-1] + reader.lengths[end - 1]], starts, dtype=np.int64)
        expected = self.num_trained[self._starts[shard] + first : self._starts[shard] + end]
        if np.array_equal(trained, expected):
            return None
        return "is damaged: it does not have as many trained tokens as the metadata says"


def verify_directory(directory: Path, *, show_progress: bool = False) -> list[str]:
    """All complaints of `Corpus.damage`; of a corpus that cannot be opened, one for each file that has changed or is missing.

    Raises DataError if the corpus cannot be opened although no file has changed.
    """
    try:
        return Corpus.open(directory).damage(show_progress=show_progress)
    except DataError:
        manifest, _ = read_manifest(directory)
        pieces = pieces_of(manifest["files"], {})
        complaints = damaged_files(directory, pieces, changed=_CHANGED, show_progress=show_progress)
        if not complaints:
            raise
        return complaints
