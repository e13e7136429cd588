"""The sidecar: reference log-probs r_t of every trajectory, computed once and cached inside the corpus directory.

corpus/reference-<fingerprint>/
    shard-00000.bin, .idx    float32, aligned with the tokens, 0 where not trained on
    manifest.json            which model, at which precision, for which corpus; SHA-256 of every file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

import numpy as np
from torch import Tensor
from typing_extensions import TypedDict

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.checksums import Checksums, checksum_file, damaged_files, pieces_of
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.indexed import IndexedReader, index_differs, write_index
from megatron_iwsft.data.manifest import MANIFEST, BlockSums, Sha256, write_manifest
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import foreign_entry, open_regular, other_kind, partial_path, publish
from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS, PlainName, check_json, is_regular_file, read_json
from megatron_iwsft.utils.locks import exclusive

FORMAT_VERSION = 1


class _Manifest(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    format_version: int
    corpus: str
    files: dict[PlainName, Sha256]
    blocks: NotRequired[dict[PlainName, BlockSums]]


@dataclass(frozen=True)
class ReferenceIdentity:
    """What reference log-probs depend on: fingerprints of weights, tokenizer and template, and the precision."""

    weights: str
    tokenizer: str
    template: str
    dtype: str

    @staticmethod
    def of(corpus: Corpus, *, weights: str, dtype: str) -> ReferenceIdentity:
        """Of a corpus's log-probs by a model with the fingerprint `weights`."""
        template = corpus.manifest["template"]
        return ReferenceIdentity(
            weights=weights,
            tokenizer=corpus.manifest["tokenizer"]["fingerprint"],
            template=template["hash"] if template else "none",
            dtype=dtype,
        )

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.weights, self.tokenizer, self.template, self.dtype])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def sidecar_directory(corpus: Corpus, identity: ReferenceIdentity) -> Path:
    return corpus.directory / f"reference-{identity.fingerprint}"


def has_sidecar(corpus: Corpus, identity: ReferenceIdentity) -> bool:
    """Whether the corpus has complete log-probs of this reference."""
    return is_regular_file(sidecar_directory(corpus, identity) / MANIFEST)


def complete_sidecars(corpus: Corpus) -> list[Path]:
    """The directories of all references whose log-probs the corpus has."""
    return sorted(path for path in corpus.directory.glob("reference-*") if (path / MANIFEST).exists())


def _check_entries(directory: Path) -> None:
    """Raise DataError unless a sidecar is a directory of regular files: a link would lead writes to another file."""
    kind = other_kind(directory, follow_links=False)
    found = foreign_entry(directory) if kind == "a directory" else (directory, kind or "a file")
    if found is not None:
        raise DataError(f"{found[0]} is {found[1]}, which `iwsft reference` does not create. Remove it.")


_CALLED = {"weights": "model", "tokenizer": "tokenizer", "template": "chat template", "dtype": "precision"}


def _differences(directory: Path, identity: ReferenceIdentity | None) -> str:
    """In parentheses, in what a sidecar's reference differs from `identity`; empty if its manifest does not say."""
    try:
        found = read_json(directory / MANIFEST, dict[str, Any], DataError, advice="").get("reference")
    except DataError:
        return ""
    if identity is None or not isinstance(found, dict):
        return ""
    other = [name for key, name in _CALLED.items() if found.get(key) != vars(identity)[key]]
    return f" (of another {' and '.join(other)})" if other else ""


class Sidecar:
    """An open, complete sidecar; `sidecar(i)` is float32 [num_tokens] of trajectory i.

    Raises DataError if there is none for this reference, or if it is incomplete, truncated or made for another corpus.
    """

    def __init__(self, corpus: Corpus, identity: ReferenceIdentity) -> None:
        self._open(corpus, sidecar_directory(corpus, identity), identity)

    @staticmethod
    def at(corpus: Corpus, directory: Path) -> Sidecar:
        """The sidecar in `directory`, whichever reference it is of."""
        sidecar = Sidecar.__new__(Sidecar)
        sidecar._open(corpus, directory, None)
        return sidecar

    def _open(self, corpus: Corpus, directory: Path, identity: ReferenceIdentity | None) -> None:
        self.directory = directory
        again = "Run `iwsft reference` with this config."
        path = self.directory / MANIFEST
        if not is_regular_file(path):
            others = [f"{p.name}{_differences(p, identity)}" for p in complete_sidecars(corpus)]
            if self.directory.is_dir():
                raise DataError(f"the reference log-probs at {self.directory} are incomplete. {again}")
            raise DataError(
                f"{corpus.directory} has no log-probs of this reference model ({self.directory.name}); it has "
                f"{', '.join(others) or 'none of any model'}. Model, tokenizer, chat template and precision must all match. {again}"
            )
        advice = f"Remove {self.directory}. {again}"
        manifest = read_json(path, dict[str, Any], DataError, advice=advice)
        version = manifest.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}; this version reads {FORMAT_VERSION}. Remove {self.directory}. {again}"
            )
        check_json(manifest, _Manifest, DataError, where=str(path), advice=advice)
        _check_entries(self.directory)
        if manifest["corpus"] != corpus.fingerprint:
            raise DataError(f"{self.directory} was computed for another version of the corpus. Remove it. {again}")
        unlisted = {f"{name}{s}" for name in corpus.shards for s in (".bin", ".idx")} - set(manifest["files"])
        if unlisted:
            raise DataError(f"{path} is damaged: it has no checksum of {min(unlisted)}. {advice}")
        self._shards = [self._open_shard(corpus, k, again) for k in range(len(corpus.shards))]
        self._corpus, self._pieces = corpus, pieces_of(manifest["files"], manifest.get("blocks", {}))

    def _open_shard(self, corpus: Corpus, number: int, again: str) -> IndexedReader:
        prefix, index = self.directory / corpus.shards[number], corpus.shard_index(number)
        try:
            if not index_differs(prefix, index.lengths):
                return IndexedReader(prefix, (np.float32,), index=index)
        except OSError as error:
            raise DataError(
                f"{error.filename or prefix} cannot be read: {error.strerror}. Remove {self.directory}. {again}"
            ) from None
        IndexedReader(prefix, (np.float32,))  # it may be damaged
        raise DataError(f"{prefix} does not match its corpus shard. Remove {self.directory}. {again}")

    def damage(self, rank: int, size: int) -> list[str]:
        """One complaint per damaged file, from rank `rank` of `size`'s share of the files' blocks. Reads all of them."""
        again = f"Remove {self.directory}, and run `iwsft reference` with this config."
        changed = "is damaged: its checksum does not match"
        complaints = damaged_files(self.directory, self._pieces[rank::size], changed=changed, show_progress=rank == 0)
        return [f"{complaint}. {again}" for complaint in complaints]

    def __call__(self, i: int) -> np.ndarray:
        shard, k = self._corpus.locate(i)
        return self._shards[shard][k]


def logprobs_by_trajectory(batch: Batch, logprobs: Tensor) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(trajectory, positions int64 [k], values float32 [k]) of each trajectory of which this rank's micro-batch has trained tokens.

    logprobs float32 [T] of its context-parallel slice. Raises DataError if one of a trained token is NaN.
    """
    trained = batch.mask.bool().cpu().numpy()
    values = logprobs.float().cpu().numpy()[trained]
    if np.isnan(values).any():
        raise DataError("the reference model returns NaN log-probs. Check its weights, or use precision.dtype: fp32.")
    segment = batch.segment.cpu().numpy()[trained]
    # A label belongs to the next token.
    positions = batch.position_ids[0].cpu().numpy()[trained] + 1
    trajectory = batch.trajectory.cpu().numpy()
    for s in np.unique(segment):
        at = segment == s
        yield int(trajectory[s]), positions[at], values[at]


class SidecarWriter:
    """Fills a sidecar; any number of ranks write their own positions into the same files.

    A trained position is NaN until its value is known, so an interrupted run finds what is left to do.
    """

    def __init__(self, corpus: Corpus, identity: ReferenceIdentity) -> None:
        self.corpus, self.identity = corpus, identity
        self.directory = sidecar_directory(corpus, identity)
        self._maps: list[np.memmap] = []
        self._files: list[int] = []
        self._shards = [corpus.shard_index(k) for k in range(len(corpus.shards))]

    @property
    def complete(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def lock(self) -> AbstractContextManager[None]:
        """On one rank, around all other calls: creates the directory and keeps other commands from writing there.

        Raises DataError if one is writing there already, or if the directory holds links.
        """
        if not self.directory.is_symlink():
            self.directory.mkdir(exist_ok=True)
        _check_entries(self.directory)
        return exclusive(self.directory, DataError)

    def prepare(self) -> None:
        """Create missing files. On one rank, before `open` on all. Raises DataError if they cannot be written."""
        fresh = self.directory / "fresh.partial"
        for index, name in enumerate(self.corpus.shards):
            path, final = self._partial(name), self.directory / f"{name}.bin"
            size = 4 * self._shards[index].end
            if final.exists() and not path.exists():  # complete, but the disk had no room for the manifest
                os.replace(final, path)
            if path.exists() and path.stat().st_size == size:
                continue
            try:
                self._create(fresh, index)
                publish(fresh, path)
            except OSError as error:
                raise DataError(
                    f"cannot write the reference log-probs at {path}: {error.strerror}. They take {size:,} bytes. "
                    "Free space there, or change the permissions, and run the same command again."
                ) from None
            finally:
                fresh.unlink(missing_ok=True)

    def _create(self, path: Path, shard: int) -> None:
        """Write a shard's log-probs before any is known."""
        with (
            open_regular(self.corpus.directory / f"{self.corpus.shards[shard]}.mask.bin") as masks,
            open(path, "wb") as file,
        ):
            while part := masks.read(1 << 24):
                trained = np.frombuffer(part, np.uint8) == 1
                file.write(np.where(trained, np.float32(np.nan), np.float32(0)).tobytes())
        # Nothing predicts a first token: its log-prob is 0 by definition, even if the mask includes it.
        values = np.memmap(path, np.float32, mode="r+")
        values[self._shards[shard].starts] = 0
        values.flush()

    def open(self) -> None:
        self._maps = [np.memmap(self._partial(name), np.float32, mode="r") for name in self.corpus.shards]
        self._files = [os.open(self._partial(name), os.O_WRONLY) for name in self.corpus.shards]

    def _partial(self, name: str) -> Path:
        return partial_path(self.directory / f"{name}.bin")

    def done(self, i: int) -> bool:
        """Whether every position of trajectory i has its value."""
        return not np.isnan(self._view(i)).any()

    def _view(self, i: int) -> np.ndarray:
        shard, k = self.corpus.locate(i)
        start = int(self._shards[shard].starts[k])
        return self._maps[shard][start : start + int(self._shards[shard].lengths[k])]

    def write(self, i: int, positions: np.ndarray, values: np.ndarray) -> None:
        """Store log-probs, float32 [k], of trajectory i at `positions`, int64 [k], ascending."""
        shard, k = self.corpus.locate(i)
        runs = np.flatnonzero(np.diff(positions) != 1) + 1
        # Not written through the mapping: on a network file system, nodes that share a page would write back each other's
        # stale values.
        with self._writing():
            for where, run in zip(np.split(positions, runs), np.split(values, runs), strict=True):
                os.pwrite(
                    self._files[shard], run.tobytes(), run.itemsize * int(self._shards[shard].starts[k] + where[0])
                )

    def flush(self) -> None:
        with self._writing():
            for file in self._files:
                os.fsync(file)

    def finish(self, described: dict[str, Any]) -> None:
        """Publish the files and write the manifest. On one rank, after every rank has flushed."""
        with self._writing():
            self._finish(described)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise DataError for what the system refuses to write."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write the reference log-probs in {self.directory}: {error.strerror or error}. Free some space or change the "
                "permissions, and run the same command again: it continues."
            ) from None

    def _finish(self, described: dict[str, Any]) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        missing = sum(int(np.isnan(values).sum()) for values in self._maps)
        if missing:
            raise DataError(f"{missing} positions of {self.directory} have no value. Run the same command again.")
        checksums = Checksums()
        for k, name in enumerate(self.corpus.shards):
            publish(self._partial(name), self.directory / f"{name}.bin")
            write_index(self.directory / name, self._shards[k].lengths, np.dtype(np.float32))
            for file_name in (f"{name}.bin", f"{name}.idx"):
                checksums.add(file_name, checksum_file(self.directory / file_name))
        write_manifest(
            self.directory,
            {
                "format_version": FORMAT_VERSION,
                "corpus": self.corpus.fingerprint,
                "reference": vars(self.identity) | described,
                **{key: value for key, value in vars(checksums).items() if value},
            },
        )
