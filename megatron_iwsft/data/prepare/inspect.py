"""Inspect a corpus: counts, distributions, drop reasons, packing, and samples with the trained tokens highlighted."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.packing import best_fit, efficiency
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import atomic_write
from megatron_iwsft.utils.text import printable

_HIGHLIGHT, _PLAIN = "\x1b[42;30m", "\x1b[0m"
_BINS = 12


@dataclass(frozen=True)
class Histogram:
    """counts, int [bins], of values between edges, float [bins + 1]."""

    title: str
    counts: np.ndarray
    edges: np.ndarray

    @staticmethod
    def of(title: str, values: np.ndarray) -> Histogram | None:
        """None if `values` is empty. Integers get integer edges; if all values are equal, there is one bin."""
        if not len(values):
            return None
        low, high = values.min(), values.max()
        if np.issubdtype(values.dtype, np.integer):
            edges = np.unique(np.linspace(int(low), int(high) + 1, _BINS + 1).astype(np.int64)).astype(np.float64)
        else:
            edges = np.linspace(low, high, _BINS + 1) if low < high else np.array([low, np.inf])
        return Histogram(title, np.histogram(values, edges)[0], edges)

    def rows(self) -> Iterator[tuple[str, int, float]]:
        """(label, count, count relative to the fullest bin) of each bin."""
        for k, count in enumerate(self.counts.tolist()):
            low, high = self.edges[k], self.edges[k + 1]
            label = f"from {low:,.4g}" if len(self.counts) > 1 or np.isfinite(high) else f"{low:,.4g}"
            yield label, count, count / max(1, self.counts.max())


@dataclass(frozen=True)
class Packing:
    """Result of best-fit packing: sequences of seq_length tokens, the fraction of real tokens, trajectories that do not fit."""

    seq_length: int
    sequences: int
    efficiency: float
    too_long: int

    @staticmethod
    def of(lengths: np.ndarray, seq_length: int) -> Packing:
        """Trajectories longer than a sequence are excluded and counted."""
        fitting = lengths[lengths <= seq_length]
        packs = best_fit(fitting, seq_length)
        return Packing(seq_length, len(packs), efficiency(fitting, packs, seq_length), len(lengths) - len(fitting))

    def __str__(self) -> str:
        excluded = f"; {self.too_long:,} trajectories are longer and excluded" if self.too_long else ""
        return f"{self.sequences:,} sequences of {self.seq_length:,}, {self.efficiency:.2%} real tokens{excluded}"


@dataclass(frozen=True)
class ShownTrajectory:
    """Trajectory `index`; `runs` is its text as (text, trained) pairs."""

    index: int
    meta: dict[str, Any]
    runs: list[tuple[str, bool]]


class Inspection:
    """Statistics of a corpus, its packing at each of `seq_lengths`, and `samples` random trajectories.

    remarks: (name, value) pairs to show among the facts
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_lengths: list[int],
        samples: int,
        seed: int = 0,
        remarks: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.corpus, self._remarks = corpus, remarks
        self.packings = [Packing.of(corpus.lengths, n) for n in seq_lengths]
        scores = corpus.scores[~np.isnan(corpus.scores)]
        found = (
            Histogram.of("tokens per trajectory", corpus.lengths),
            Histogram.of("trained tokens per trajectory", corpus.num_trained),
            Histogram.of("score", scores),
        )
        self.histograms = [h for h in found if h is not None]
        chosen = np.random.default_rng(seed).permutation(len(corpus))[:samples]
        tokenizer = corpus.tokenizer() if samples else None
        self.samples = [
            ShownTrajectory(int(i), _meta_of(corpus, int(i)), runs(corpus, int(i), tokenizer))
            for i in np.sort(chosen).tolist()
        ]

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) pairs from the manifest and the packings."""
        manifest, counts = self.corpus.manifest, self.corpus.manifest["counts"]
        trained = counts["trained_tokens"] / max(1, counts["tokens"])
        out = [
            ("trajectories", f"{counts['trajectories']:,} in {len(manifest['shards'])} shards"),
            ("tokens", f"{counts['tokens']:,}"),
            ("trained tokens", f"{counts['trained_tokens']:,} ({trained:.1%})"),
            ("scores", _spread(manifest["scores"])),
            ("lengths", _spread(manifest["lengths"])),
        ]
        out += [(f"source {name}", f"{n:,}") for name, n in manifest.get("sources", {}).items()]
        out.append(("dropped", f"{counts['dropped']:,}"))
        out += [(f"dropped: {reason}", f"{n:,}") for reason, n in manifest["dropped"].items()]
        out += [(f"not checked: {reason}", f"{n:,}") for reason, n in manifest.get("unchecked", {}).items()]
        out += [
            (f"key {key} of messages is not used", f"{n:,} record{'s' * (n != 1)}") for key, n in unused_keys(manifest)
        ]
        out += [(f"packed to {p.seq_length}", str(p)) for p in self.packings]
        return [*out, *self._remarks]

    def to_terminal(self, *, colour: bool) -> str:
        facts = [(printable(name), printable(value)) for name, value in self.facts()]
        width = max(len(name) for name, _ in facts)
        lines = [printable(str(self.corpus.directory)), *(f"  {name:<{width}}  {value}" for name, value in facts)]
        for histogram in self.histograms:
            rows = list(histogram.rows())
            label = max(len(name) for name, _, _ in rows)
            lines += ["", histogram.title]
            lines += [f"  {name:>{label}}  {'█' * round(40 * share):<40} {count:,}" for name, count, share in rows]
        begin, end = (_HIGHLIGHT, _PLAIN) if colour else ("⟦", "⟧")
        for sample in self.samples:
            lines += ["", printable(_heading(sample))]
            shown = [(printable(text), trained) for text, trained in sample.runs]
            lines.append("".join(f"{begin}{text}{end}" if trained else text for text, trained in shown))
        return "\n".join(lines)

    def to_html(self) -> str:
        """One self-contained HTML page."""
        name = html.escape(self.corpus.directory.name)
        facts = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in self.facts())
        charts = "".join(
            f"<h2>{html.escape(h.title)}</h2><table>"
            + "".join(
                f"<tr><th>{html.escape(row)}<td><div style='width:{30 * share:.2f}em'></div> {count:,}"
                for row, count, share in h.rows()
            )
            + "</table>"
            for h in self.histograms
        )
        samples = "".join(
            f"<h3>{html.escape(_heading(s))}</h3><pre>"
            + "".join(f"<mark>{html.escape(t)}</mark>" if trained else html.escape(t) for t, trained in s.runs)
            + "</pre>"
            for s in self.samples
        )
        title = "<h2>samples (trained tokens are highlighted)</h2>" if self.samples else ""
        return f"{_HEAD.replace('NAME', name)}<h1>{name}</h1><table>{facts}</table>{charts}{title}{samples}\n"


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>NAME</title><style>
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
th{text-align:right;font-weight:normal;color:#555;padding-right:1em;vertical-align:top;white-space:nowrap}
td div{display:inline-block;height:.8em;background:#4a7ab5;vertical-align:middle}
pre{white-space:pre-wrap;background:#f6f6f4;padding:1em;border-radius:4px}mark{background:#bfe8c5}
</style>"""


def runs(corpus: Corpus, i: int, tokenizer: Any = None) -> list[tuple[str, bool]]:
    """The text of trajectory i, split where the loss mask changes: [(text, trained)]."""
    tokenizer = tokenizer or corpus.tokenizer()
    tokens, mask = corpus.tokens(i).tolist(), corpus.mask(i)
    ends = [*(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    out, done = [], 0
    for end in ends:
        # Decoding a run alone could lose text between tokens, such as spaces, so the text up to its end is decoded.
        text = tokenizer.decode(tokens[:end])
        out.append((text[done:], bool(mask[end - 1])))
        done = len(text)
    return out


def write_jsonl(corpus: Corpus, path: Path) -> int:
    """Write a corpus as JSONL, one trajectory per line: id, source, score, text, input_ids, loss_mask. Returns their number.

    Sharding the file again gives the same tokens and masks. The file is written atomically. Raises DataError if it exists.
    """
    tokenizer = corpus.tokenizer()
    if path.exists():
        raise DataError(f"{path} already exists. Choose another name, or remove it.")
    with atomic_write(path, "wb") as file:
        i = 0
        for shard in corpus.shards:
            for row in corpus.shard_meta(shard, ["id", "source", "score"]).to_pylist():
                tokens, mask = corpus.tokens(i).tolist(), corpus.mask(i).tolist()
                record = {k: v for k, v in row.items() if v is not None}
                record |= {"text": tokenizer.decode(tokens), "input_ids": tokens, "loss_mask": mask}
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                i += 1
    return i


def unused_keys(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """(key, number of records whose messages have it) of the keys that were not used, the most frequent first."""
    return sorted(manifest.get("unused_keys", {}).items(), key=lambda entry: (-entry[1], entry[0]))


def _meta_of(corpus: Corpus, i: int) -> dict[str, Any]:
    shard, k = corpus.locate(i)
    columns = ["id", "score", "source", "num_tokens", "num_trained"]
    return corpus.shard_meta(corpus.shards[shard], columns).slice(k, 1).to_pylist()[0]


def _heading(sample: ShownTrajectory) -> str:
    meta = sample.meta
    score = "" if meta["score"] is None else f", score {meta['score']:g}"
    return f"#{sample.index} {meta['id']} ({meta['source']}{score}): {meta['num_tokens']} tokens, {meta['num_trained']} trained"


def _spread(distribution: dict[str, Any] | None) -> str:
    if distribution is None:
        return "none"
    p = distribution["percentiles"]
    return f"{p['0']:g} … {p['100']:g}, median {p['50']:g}, mean {distribution['mean']:.4g}"
