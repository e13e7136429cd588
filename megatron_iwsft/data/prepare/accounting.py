"""Whether a corpus adds up: every record of its inputs was kept or dropped, once, as its manifest counts them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.compute as pc

from megatron_iwsft.data.corpus import DROPPED, Corpus, verify_directory
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import open_regular

_FIELDS = {"file": str, "line": int, "id": str, "reason": str}
_LONGEST_ENTRY = 1 << 26  # bytes
_LINE_BITS = 40  # of a record's key; the rest is the number of its file


def verify(directory: Path, *, show_progress: bool = False) -> list[str]:
    """All complaints about a corpus: `verify_directory`'s and, if it can be opened, those of `accounting_complaints`."""
    complaints = verify_directory(directory, show_progress=show_progress)
    with contextlib.suppress(DataError, OSError):  # then it is among the complaints
        complaints += accounting_complaints(Corpus.open(directory))
    return complaints


def accounting_complaints(corpus: Corpus) -> list[str]:
    """What does not add up between dropped.jsonl, the manifest and the trajectories. Raises OSError if dropped.jsonl is not a file."""
    manifest, path = corpus.manifest, corpus.directory / DROPPED
    dropped = _Dropped.read(path)
    complaints = list(dropped.complaints)
    _compare(complaints, "entries", dropped.count, manifest["counts"]["dropped"])
    for reason in sorted(dropped.reasons.keys() | manifest["dropped"].keys()):
        _compare(
            complaints,
            f"entries with the reason {reason!r}",
            dropped.reasons[reason],
            manifest["dropped"].get(reason, 0),
        )
    kept = _keys_of_kept(dropped, corpus)
    complaints += _twice(dropped)
    complaints += _kept_too(dropped, kept, corpus)
    complaints += _per_input(dropped, kept, manifest.get("inputs", []))
    complaints = [f"{path} {complaint}" for complaint in complaints]
    if len(corpus) != (counted := manifest["counts"]["trajectories"]):
        complaints.append(f"{corpus.directory} has {len(corpus):,} trajectories; its manifest counts {counted:,}")
    return complaints


@dataclass
class _Dropped:
    """dropped.jsonl. keys: int64 per entry, file number and line; ids: of each entry; files: names, numbered by their order."""

    reasons: Counter[str] = field(default_factory=Counter)
    files: dict[str, int] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    complaints: list[str] = field(default_factory=list)

    @staticmethod
    def read(path: Path) -> _Dropped:
        out, keys = _Dropped(), []
        with open_regular(path) as file:
            for number, entry in _entries(file):
                if entry is None:
                    out.complaints.append(f"is damaged: line {number} is not an entry")
                    break
                keys.append(out.key(entry["file"], entry["line"]))
                out.ids.append(entry["id"])
                out.reasons[entry["reason"]] += 1
        out.keys = np.array(keys, np.int64)
        return out

    @property
    def count(self) -> int:
        return len(self.ids)

    def key(self, file: str, line: int) -> int:
        return self.files.setdefault(file, len(self.files)) << _LINE_BITS | line

    def name(self, key: int) -> str:
        return f"line {key & (1 << _LINE_BITS) - 1} of {list(self.files)[key >> _LINE_BITS]}"


def _entries(file: Any) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line number, entry, or None if it is none) of each line."""
    number = 0
    while line := file.readline(_LONGEST_ENTRY):
        number += 1
        try:
            entry = orjson.loads(line)
            valid = (
                all(type(entry[name]) is kind for name, kind in _FIELDS.items()) and 0 < entry["line"] < 1 << _LINE_BITS
            )
        except (ValueError, KeyError, TypeError):
            valid = False
        yield number, entry if valid else None


def _compare(complaints: list[str], what: str, found: int, counted: int) -> None:
    if found != counted:
        complaints.append(f"has {found:,} {what}; the manifest counts {counted:,}")


def _twice(dropped: _Dropped) -> Iterator[str]:
    """Records with two entries. One record can have several trajectories, which differ in their id."""
    unique, counts = np.unique(dropped.keys, return_counts=True)
    rows = np.flatnonzero(np.isin(dropped.keys, unique[counts > 1]))
    times = Counter((int(dropped.keys[row]), dropped.ids[row]) for row in rows.tolist())
    again = [pair for pair, count in times.items() if count > 1]
    if again:
        yield f"lists {_and_others(dropped.name(again[0][0]), len(again))} twice"


def _kept_too(dropped: _Dropped, kept: np.ndarray, corpus: Corpus) -> Iterator[str]:
    """Trajectories that are in the corpus and in dropped.jsonl."""
    rows = np.flatnonzero(np.isin(kept, dropped.keys))
    if not len(rows):
        return
    entries = set(zip(dropped.keys.tolist(), dropped.ids, strict=True))
    names = corpus.meta(["id"])["id"].take(rows).to_pylist()
    both = [key for key, name in zip(kept[rows].tolist(), names, strict=True) if (key, name) in entries]
    if both:
        yield f"lists {_and_others(dropped.name(both[0]), len(both))}, which was kept"


def _per_input(dropped: _Dropped, kept: np.ndarray, inputs: list[dict[str, Any]]) -> Iterator[str]:
    """Inputs whose records are not all kept or dropped. Manifests without these numbers are not checked."""
    if not all("records" in entry for entry in inputs):
        return
    found = np.bincount(np.unique(np.concatenate([dropped.keys, kept])) >> _LINE_BITS, minlength=len(dropped.files))
    for name in sorted(dropped.files.keys() - {entry["name"] for entry in inputs}):
        yield f"lists records of {name}, which is no input of this corpus"
    for entry in inputs:
        number = dropped.files.get(entry["name"])
        accounted = 0 if number is None else int(found[number])
        if accounted != entry["records"]:
            yield f"does not add up: of {entry['records']:,} records in {entry['name']}, {accounted:,} are kept or dropped"


def _keys_of_kept(dropped: _Dropped, corpus: Corpus) -> np.ndarray:
    """The keys of kept trajectories, int64 [n]."""
    meta = corpus.meta(["file", "line"]).combine_chunks()
    files = pc.dictionary_encode(meta["file"].combine_chunks())
    names = [dropped.key(name, 0) for name in files.dictionary.to_pylist()]
    return np.array(names, np.int64)[files.indices.to_numpy()] | meta["line"].to_numpy()


def _and_others(first: str, count: int) -> str:
    return first if count == 1 else f"{first} and {count - 1:,} other records"
