"""Encode a block of records: render, tokenize, mask, score and hash each, or drop it with a reason. Runs in the worker processes.

A Python loop visits each record once, to extract its texts. Everything on tokens is vectorized over the block.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from megatron_iwsft.data.chat_template import CONTROL, ChatTemplate, Trajectory
from megatron_iwsft.data.conversation import Conversation
from megatron_iwsft.data.indexed import token_dtype
from megatron_iwsft.data.metadata import TURN_WEIGHTS
from megatron_iwsft.data.prepare.fast_encoding import CheckedEncoder, Encoder, gigatoken_encoder
from megatron_iwsft.data.prepare.filters import AnswerCheck, Benchmarks, Curation, Signatures
from megatron_iwsft.data.prepare.messages import Dropped, UnreadableKeys
from megatron_iwsft.data.prepare.readers import Block, numbered_records
from megatron_iwsft.data.prepare.records import NESTED, RecordFormat, RecordReader, Sample
from megatron_iwsft.data.template_engine import TemplateError
from megatron_iwsft.data.template_tracing import TracedFrame
from megatron_iwsft.data.tokenizer import Tokenizer, any_of

_LONGEST_KEY = 60
UNUSED_KEYS = pa.list_(pa.string())
NO_TOKEN = "text that the tokenizer has no token for"
_REMOVE = "remove it from the text, or use a tokenizer that can write it"
_PLAIN = "if it is ordinary text there, name it with --plain-token"


def row_schema(token_type: np.dtype, curation: Curation) -> pa.Schema:
    """Schema of an encoded block. A row is one trajectory, or a dropped one (`reason` is not null, and it has no tokens)."""
    fields = [
        ("line", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("unused_keys", UNUSED_KEYS),  # of the record's messages, at its first row
        ("score", pa.float64()),
        ("num_trained", pa.int32()),
        ("turn_weights", TURN_WEIGHTS),
        ("content_hash", pa.binary(32)),
        ("tokens", pa.large_list(pa.from_numpy_dtype(token_type))),
        ("mask", pa.large_list(pa.uint8())),
    ]
    if curation.benchmarks:
        fields.append(("short", pa.bool_()))  # too short to share a run of words with a benchmark problem
    if curation.near_duplicates is not None:
        fields.append(("signature", pa.binary()))  # null: no words to compare
    return pa.schema(fields)


class _Rows:
    """The rows of a block before tokenization. `pieces` and `trained` hold those of all rendered rows, end to end."""

    def __init__(self) -> None:
        self.columns: list[tuple[int, str, str, float | None]] = []  # line, id, source, score
        self.dropped: dict[int, Dropped] = {}
        self.rendered: list[int] = []  # indices of the rendered rows
        self.pieces: list[str] = []
        self.counts: list[int] = []  # pieces of each rendered row
        self.trained: list[bool] = []  # of each piece
        self.controls: list[int] = []  # control tokens that the template wrote in each rendered row
        self.pretokenized: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # row → (ids, mask)
        self.texts: dict[int, str] = {}  # row → text, for signatures
        self.unused_keys: dict[int, list[str]] = {}  # row → keys of messages that are not used
        self.unreadable: dict[str, str] = {}  # as `UnreadableKeys.places`
        self.short: set[int] = set()  # rows that are too short to share a run of words with a benchmark problem
        self.turn_weights: dict[int, list[float]] = {}  # row → weight of each run of trained tokens, where one is not 1

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        self.dropped[row] = Dropped(reason, detail)

    def __len__(self) -> int:
        return len(self.columns)


class BlockEncoder:
    """Encodes blocks. `template` may be None if the records are already tokenized; `fast` encodes with gigatoken."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        record_format: RecordFormat,
        curation: Curation,
        *,
        fast: bool,
    ) -> None:
        self.tokenizer, self.template, self.curation = tokenizer, template, curation
        self.reader = RecordReader(record_format, keep=curation.keep, min_score=curation.min_score)
        self._token_dtype = token_dtype(tokenizer.vocab_size)
        self.schema = row_schema(self._token_dtype, curation)
        plain = set(record_format.plain_tokens)
        control = any_of(tokenizer.control - plain)
        self._search_control, self._find_control = control.search, control.findall
        self._encode: Encoder = tokenizer.encode_batch
        if fast:
            encoder = gigatoken_encoder(tokenizer)
            assert not isinstance(encoder, str), encoder
            self._encode = CheckedEncoder(tokenizer, encoder)
        self._benchmarks = Benchmarks(curation) if curation.benchmarks else None
        self._answers = AnswerCheck(curation.answer_field, curation.wrong_answers) if curation.answer_field else None
        self._signatures = Signatures() if curation.near_duplicates is not None else None
        self._is_control = np.zeros(tokenizer.vocab_size, bool)
        self._is_control[[i for i in tokenizer.control_ids if tokenizer.decode([i]) not in plain]] = True
        self._control_counts: dict[int, int] = {}  # by the id() of a traced frame

    def __call__(self, block: Block) -> pa.RecordBatch:
        """The rows of a block, in order, with the columns of `row_schema`. Raises UnreadableKeys."""
        rows = self.prepare(block)
        if rows.unreadable:
            raise UnreadableKeys(rows.unreadable)
        ids, piece_lengths = self._encode(rows.pieces, rows.counts)
        flags = np.asarray(rows.trained, np.uint8)
        tokens = _Tokens(
            ids, np.repeat(flags, piece_lengths), *_sum_per_row(rows.counts, piece_lengths, piece_lengths * flags)
        )
        self._check_controls(rows, tokens)
        self._check_unknown(rows, tokens)
        tokens = _insert_pretokenized(rows, tokens)
        return self._batch(rows, self._check_lengths(rows, tokens))

    def prepare(self, block: Block, *, records: int | None = None) -> _Rows:
        """Everything before tokenization; of the first `records` of the block only, if given."""
        rows, stem = _Rows(), block.source.stem
        add, read, messages = rows.columns.append, self.reader.read, self.reader.messages
        for line, record in itertools.islice(numbered_records(block, longest=self.curation.max_record_bytes), records):
            samples = (record,) if isinstance(record, Dropped) else read(record)
            if messages.unused or messages.unreadable:
                self._take_keys(rows, f"{block.source.name}, line {line}")
            for sample in samples:
                name = sample.id or f"{stem}:{line}"
                if sample.number is not None:
                    name = f"{name}#{sample.number}"
                if isinstance(sample, Dropped):
                    rows.dropped[len(rows)] = sample
                    add((line, name, stem, None))
                    continue
                first = len(rows)
                try:
                    if self._answers is not None:
                        self._answers.check(record, sample)  # type: ignore[arg-type]
                    suffixes = self._add(rows, first, sample)
                except (Dropped, RecursionError) as error:
                    dropped = error if isinstance(error, Dropped) else Dropped(*NESTED)
                    rows.dropped[first], suffixes = dropped.with_traceback(None), ("",)
                source = sample.source or stem
                rows.columns += [(line, name + suffix, source, sample.score) for suffix in suffixes]
        return rows

    def find_unreadable(self, block: Block) -> dict[str, str]:
        """The block's `UnreadableKeys.places`, without encoding it."""
        rows = _Rows()
        for line, record in numbered_records(block, longest=self.curation.max_record_bytes):
            if not isinstance(record, Dropped):
                self.reader.read(record)
                self._take_keys(rows, f"{block.source.name}, line {line}")
        return rows.unreadable

    def _take_keys(self, rows: _Rows, place: str) -> None:
        """Move the keys that the reader found in the record at `place` to the record's first row."""
        messages = self.reader.messages
        if messages.unused:
            rows.unused_keys[len(rows)] = sorted({key[:_LONGEST_KEY] for key in messages.unused})
            messages.unused.clear()
        for key in messages.unreadable:
            rows.unreadable.setdefault(key, place)
        messages.unreadable.clear()

    def _add(self, rows: _Rows, first: int, sample: Sample) -> Sequence[str]:
        """Add the sample's trajectories as rows from number `first` on. Returns what distinguishes their ids."""
        if sample.conversation is None:
            self._add_tokens(rows, first, sample)
            return ("",)
        if self.template is None:
            raise Dropped("no chat template", "the first records were already tokenized, this one is text")
        conversation = self.template.separate_reasoning(sample.conversation)
        self._check_content(conversation)
        short = self._benchmarks is not None and not self._benchmarks.check(conversation)
        try:
            trajectories = self.template.trajectories(conversation)
        except TemplateError as error:
            raise Dropped(error.reason, str(error)) from None
        if self.tokenizer.unwritable is not None:
            self._check_writable(trajectories)
        if short:
            rows.short.update(range(first, first + len(trajectories)))
        single = len(trajectories) == 1
        for row, (texts, turns, frame) in enumerate(trajectories, first):
            rows.rendered.append(row)
            rows.counts.append(len(texts))
            rows.pieces += texts
            rows.trained += [turn is not None for turn in turns] if frame is None else frame.trained
            rows.controls.append(
                sum(len(self._find_control(text)) for text in texts)
                if frame is None  # no text has one, and none forms one: `ChatTemplate` has compared
                else self._control_counts.get(id(frame)) or self._count_controls(frame)
            )
            if conversation.weights and any(weight not in (None, 0, 1) for weight in conversation.weights):
                rows.turn_weights[row] = _run_weights(turns, conversation.weights)
            if self._signatures is not None:
                # The trajectories of one conversation share most of their text, and are not duplicates of each other.
                trained = [text for text, turn in zip(texts, turns, strict=True) if turn is not None]
                rows.texts[row] = " ".join(conversation.texts if single else trained)
        return ("",) if single else [f"@{trajectory.last_turn}" for trajectory in trajectories]

    def _check_writable(self, trajectories: Sequence[Trajectory]) -> None:
        assert self.tokenizer.unwritable is not None
        for text in itertools.chain.from_iterable(texts for texts, *_ in trajectories):
            raw = text.encode()
            if found := self.tokenizer.unwritable.search(raw):
                around = raw[max(0, found.start() - 20) : found.end() + 20].decode(errors="ignore")
                raise Dropped(NO_TOKEN, f"the byte 0x{found.group().hex()} in {around!r}; {_REMOVE}")

    def _add_tokens(self, rows: _Rows, row: int, sample: Sample) -> None:
        assert sample.tokens is not None and sample.mask is not None
        limit = self.tokenizer.vocab_size
        if len(sample.tokens) and sample.tokens.max() >= limit:
            raise Dropped(
                "token outside the vocabulary", f"ids go up to {sample.tokens.max()}, the vocabulary to {limit - 1}"
            )
        if self._benchmarks is not None and not self._benchmarks.check_tokens(sample, self.tokenizer):
            rows.short.add(row)
        rows.pretokenized[row] = sample.tokens, sample.mask
        if self._signatures is not None:
            rows.texts[row] = " ".join(map(str, sample.tokens.tolist()))

    def _check_content(self, conversation: Conversation) -> None:
        search = self._search_control
        for k, text in enumerate(conversation.texts):
            if found := search(text):
                role = conversation.shape[k] if conversation.shape[k] != "content" else conversation.shape[k - 1]
                raise Dropped(CONTROL, f"{found.group()!r} in a text of the {role} ({_PLAIN})")
        # The template might also render names, tool calls, tools and the record's template variables.
        if conversation.full_messages is None and not conversation.options:
            return
        beside = [conversation.full_messages, conversation.tools, conversation.options]
        if found := search(json.dumps(beside, ensure_ascii=False, default=str)):
            raise Dropped(CONTROL, f"{found.group()!r} outside the texts, such as in a tool call ({_PLAIN})")

    def _count_controls(self, frame: TracedFrame) -> int:
        """Number of control tokens in a frame, counted by tokenizing it."""
        texts = [text.replace("%s", "a").replace("%%", "%") for text, _ in frame.pieces]
        ids, _ = self.tokenizer.encode_batch(texts, [len(texts)])
        self._control_counts[id(frame)] = count = int(self._is_control[ids].sum())
        return count

    def _check_controls(self, rows: _Rows, tokens: _Tokens) -> None:
        """Drop rows in which a text forms a control token together with the template text around it."""
        at = np.flatnonzero(self._is_control[tokens.ids])
        row_of = np.searchsorted(np.cumsum(tokens.lengths), at, side="right")
        found = np.bincount(row_of, minlength=len(rows.rendered))
        for k in np.flatnonzero(found != np.asarray(rows.controls, np.int64)).tolist():
            rows.drop(
                rows.rendered[k],
                CONTROL,
                "a text forms one together with the template text around it",
            )

    def _check_unknown(self, rows: _Rows, tokens: _Tokens) -> None:
        """Drop rows with text for which the tokenizer has the unknown token only."""
        if self.tokenizer.unknown is None:
            return
        name, number = self.tokenizer.unknown
        at = np.flatnonzero(tokens.ids == number)
        row_of = np.searchsorted(np.cumsum(tokens.lengths), at, side="right")
        firsts = [0, *itertools.accumulate(rows.counts)] if len(at) else []
        for k, found in zip(*(a.tolist() for a in np.unique(row_of, return_counts=True)), strict=True):
            text = "".join(rows.pieces[firsts[k] : firsts[k + 1]])
            if found > text.count(name):  # which a template may write
                unknown = next((c for c in dict.fromkeys(text) if number in self.tokenizer.encode_pieces([c])[0]), text)
                rows.drop(rows.rendered[k], NO_TOKEN, f"{unknown!r:.60}; {_REMOVE}")

    def _check_lengths(self, rows: _Rows, tokens: _Tokens) -> _Tokens:
        """Drop rows by length and mask. Returns the tokens of all rows, with none for dropped rows."""
        low, high = self.curation.min_tokens or 0, self.curation.max_tokens or np.iinfo(np.int64).max
        if self.curation.too_long == "truncate":
            tokens = _truncated(tokens, high)
        lengths, trained = tokens.lengths, tokens.trained
        alive = np.ones(len(rows), bool)
        alive[list(rows.dropped)] = False
        wrong = alive & ((trained == 0) | (trained == lengths) | (lengths < low) | (lengths > high))
        for row in np.flatnonzero(wrong).tolist():
            n = int(lengths[row])
            if trained[row] == 0:
                rows.drop(row, "nothing to train on", "the loss mask is all zeros")
            elif trained[row] == n:
                rows.drop(row, "no prompt", "the loss mask is all ones")
            elif n > high:
                rows.drop(row, "too long", f"{n} tokens; the maximum is {high}")
            else:
                rows.drop(row, "too short", f"{n} tokens; the minimum is {low}")
        alive &= ~wrong
        if alive.all():
            return tokens
        keep = np.repeat(alive, lengths)
        return _Tokens(tokens.ids[keep], tokens.mask[keep], lengths * alive, trained * alive)

    def _batch(self, rows: _Rows, tokens: _Tokens) -> pa.RecordBatch:
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        lines, ids, sources, scores = zip(*rows.columns, strict=True) if rows.columns else ((), (), (), ())
        reasons: list[str | None] = [None] * len(rows)
        details = list(reasons)
        for row, dropped in rows.dropped.items():
            reasons[row], details[row] = dropped.reason, dropped.detail or None
        columns = [
            pa.array(lines, pa.int64()),
            pa.array(ids, pa.string()),
            pa.array(sources, pa.string()),
            pa.array(reasons, pa.string()),
            pa.array(details, pa.string()),
            pa.array([rows.unused_keys.get(row) for row in range(len(rows))], UNUSED_KEYS)
            if rows.unused_keys
            else pa.nulls(len(rows), UNUSED_KEYS),
            pa.array(scores, pa.float64()),
            pa.array(tokens.trained.astype(np.int32)),
            pa.array([rows.turn_weights.get(row) for row in range(len(rows))], TURN_WEIGHTS),
            _content_hashes(tokens, offsets, rows.turn_weights),
            pa.LargeListArray.from_arrays(offsets, tokens.ids.astype(self._token_dtype)),
            pa.LargeListArray.from_arrays(offsets, tokens.mask),
        ]
        if self._benchmarks is not None:
            columns.append(pa.array([row in rows.short for row in range(len(rows))], pa.bool_()))
        if self._signatures is not None:
            columns.append(self._signature_column(rows))
        return pa.record_batch(columns, schema=self.schema)

    def _signature_column(self, rows: _Rows) -> pa.Array:
        assert self._signatures is not None
        out: list[bytes | None] = [None] * len(rows)
        wanted = [row for row in rows.texts if row not in rows.dropped]
        for row, signature in zip(wanted, self._signatures([rows.texts[row] for row in wanted]), strict=True):
            out[row] = signature
        return pa.array(out, pa.binary())


def _run_weights(turns: Sequence[int | None], weights: Sequence[float | None]) -> list[float]:
    """The weight of each run of trained pieces, given the message that each piece trains. Raises Dropped where two weights touch."""
    out = []
    for trained, run in itertools.groupby(turns, lambda turn: turn is not None):
        if trained:
            found = {1.0 if weights[turn] is None else float(weights[turn] or 0) for turn in run if turn is not None}
            if len(found) > 1:
                raise Dropped(
                    "turns of different weights touch", f"weights {sorted(found)}, and no text between the turns"
                )
            out.append(found.pop())
    return out


@dataclass(frozen=True)
class _Tokens:
    """Tokens of all rows, end to end: ids int32, mask uint8. Per row, int64: lengths, and trained, the number of trained tokens."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray


def _sum_per_row(counts: list[int], *values: np.ndarray) -> Iterator[np.ndarray]:
    """For each array of `values` (one value per piece), its sum over the pieces of each row."""
    ends = np.cumsum([0, *counts])
    for value in values:
        yield np.diff(np.concatenate([[0], np.cumsum(value)])[ends]).astype(np.int64)


def _insert_pretokenized(rows: _Rows, tokens: _Tokens) -> _Tokens:
    """The tokens of all rows: rendered, pre-tokenized, or none for dropped rows."""
    lengths, trained = np.zeros((2, len(rows)), np.int64)
    lengths[rows.rendered], trained[rows.rendered] = tokens.lengths, tokens.trained
    if not rows.pretokenized:
        return _Tokens(tokens.ids, tokens.mask, lengths, trained)
    cuts = np.cumsum(tokens.lengths)[:-1]
    rendered = zip(np.split(tokens.ids, cuts), np.split(tokens.mask, cuts), strict=True)
    parts = dict(zip(rows.rendered, rendered, strict=False)) | rows.pretokenized
    for row, (ids, mask) in rows.pretokenized.items():
        lengths[row], trained[row] = len(ids), mask.sum()
    in_order = [parts[row] for row in sorted(parts)]
    return _Tokens(np.concatenate([i for i, _ in in_order]), np.concatenate([m for _, m in in_order]), lengths, trained)


def _truncated(tokens: _Tokens, length: int) -> _Tokens:
    """The first `length` tokens of every row."""
    if not (tokens.lengths > length).any():
        return tokens
    ends = np.cumsum(tokens.lengths)
    at = np.arange(len(tokens.ids)) - np.repeat(ends - tokens.lengths, tokens.lengths)
    keep = at < length
    lengths = np.minimum(tokens.lengths, length)
    mask = tokens.mask[keep]
    trained = np.diff(np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])[np.concatenate([[0], np.cumsum(lengths)])])
    return _Tokens(tokens.ids[keep], mask, lengths, trained)


def _content_hashes(tokens: _Tokens, offsets: np.ndarray, turn_weights: dict[int, list[float]]) -> pa.Array:
    """SHA-256 of each row's content: of 2·token + mask as little-endian int32, then of the weights of its turns as float32, if any."""
    raw = (tokens.ids * 2 + tokens.mask).astype("<i4", copy=False).view(np.uint8).data
    bounds = (4 * offsets).tolist()
    digests = [hashlib.sha256(raw[a:b]).digest() for a, b in itertools.pairwise(bounds)]
    for row, weights in turn_weights.items():
        content = bytes(raw[bounds[row] : bounds[row + 1]]) + np.asarray(weights, "<f4").tobytes()
        digests[row] = hashlib.sha256(content).digest()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(bounds) - 1, [None, pa.py_buffer(b"".join(digests))])
