"""Curation: settings, and the filters on single records: leaked benchmarks, wrong answers; MinHash signatures.

Filters on single records run in the worker processes. Filters that depend on earlier records (`dedup.py`, applied by
`corpus_writer.py`) run in input order.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_iwsft.data.conversation import Conversation
from megatron_iwsft.data.prepare.expressions import MissingField, compile_expression, lookup
from megatron_iwsft.data.prepare.messages import Dropped
from megatron_iwsft.data.prepare.readers import find_inputs, fingerprint, read_blocks, rows_of
from megatron_iwsft.data.prepare.records import Sample, parse
from megatron_iwsft.errors import DataError

NGRAM = 8
NUM_PERMUTATIONS, SEED = 128, 42  # of MinHash
_SHINGLE = 5  # words
_PROBLEM_FIELDS = ("problem", "question", "prompt", "text")


@dataclass(frozen=True)
class Curation:
    """Which records are kept. All others are listed in dropped.jsonl with the reason.

    keep             expression over a record's fields that must be true
    min_score        minimum score
    min_tokens, max_tokens   bounds on a trajectory's length
    too_long         "drop" drops a trajectory above max_tokens; "truncate" keeps its first max_tokens tokens
    near_duplicates  drop a trajectory whose similarity to an earlier one is at least this (Jaccard similarity of word 5-grams,
                     estimated by MinHash), 0.3 … 1; None to keep near-duplicates. Exact duplicates are always dropped.
    benchmarks       files of benchmark problems; a trajectory whose prompt shares 8 consecutive words with one is dropped
    answer_field     field of the record's reference answer, which the response's answer is compared with
    wrong_answers    "drop" drops responses with a wrong answer; "score" keeps all and sets the score to 0 or 1
    max_per_source   keep at most this many trajectories of each source, the first ones
    """

    keep: str | None = None
    min_score: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    too_long: Literal["drop", "truncate"] = "drop"
    near_duplicates: float | None = None
    benchmarks: tuple[str, ...] = ()
    answer_field: str | None = None
    wrong_answers: Literal["drop", "score"] = "drop"
    max_per_source: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            compile_expression(self.keep)
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise DataError(
                f"the similarity threshold for near-duplicates must be between 0.3 and 1; found {self.near_duplicates:g}."
            )
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise DataError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}): no trajectory could be kept."
            )
        if self.too_long == "truncate" and self.max_tokens is None:
            raise DataError("--too-long truncate needs the number of tokens to keep: give it with --max-tokens.")
        if self.wrong_answers == "score" and self.answer_field is None:
            raise DataError(
                "--wrong-answers score needs the field of the reference answer: name it with --answer-field."
            )

    def manifest_entry(self) -> dict[str, Any]:
        """The settings for the manifest, with benchmark files given by name and hash instead of by path."""
        files = find_inputs(self.benchmarks) if self.benchmarks else []
        return {**self.__dict__, "benchmarks": [{"name": f.name, "sha256": fingerprint(f)} for f in files]}

    def check_libraries(self) -> None:
        """Raises DataError if a library that these settings need is not installed."""
        if self.near_duplicates is not None:
            import_library("rensa", "near-duplicate removal")
        if self.answer_field is not None:
            import_library("math_verify", "answer verification")


def import_library(name: str, purpose: str) -> Any:
    """Import an optional package. Raises DataError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{purpose} needs the package {name.replace('_', '-')}: pip install {name.replace('_', '-')}."
        ) from None


class Benchmarks:
    """Word 8-grams of the benchmark problems, as in s1 (arXiv 2501.19393): lower case, split at whitespace."""

    def __init__(self, files: Sequence[str]) -> None:
        self._problem_of: dict[str, str] = {}
        for source in find_inputs(files):
            for block in read_blocks(source):
                for at, record in enumerate(_records(block.content()), block.first + 1):
                    problem = next((record[f] for f in _PROBLEM_FIELDS if isinstance(record.get(f), str)), None)
                    if problem is None:
                        raise DataError(
                            f"{source.path}, line {at}: a benchmark problem needs one of the fields {', '.join(_PROBLEM_FIELDS)}."
                        )
                    for gram in _ngrams(problem, NGRAM):
                        self._problem_of.setdefault(gram, f"{source.name}:{at}")

    def check(self, conversation: Conversation) -> None:
        """Raises Dropped if a user turn shares 8 consecutive words with a problem."""
        known = self._problem_of
        for role, text in zip(conversation.shape, conversation.texts, strict=True):
            if role == "user":
                for gram in _ngrams(text, NGRAM):
                    if gram in known:
                        raise Dropped("in a benchmark", f"{known[gram]} also has {gram!r}")


def _records(payload: Any) -> Iterable[dict[str, Any]]:
    if isinstance(payload, bytes):
        for line in payload.splitlines():
            if line.strip():
                try:
                    yield parse(line)
                except Dropped as dropped:
                    raise DataError(
                        f"a benchmark file holds a line that is {dropped.reason}: {dropped.detail}"
                    ) from None
    else:
        for row in rows_of(payload):
            if isinstance(row, Exception):
                raise DataError(f"a benchmark file holds a row that cannot be read: {row}")
            yield row


def _ngrams(text: str, n: int) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


class AnswerCheck:
    """Compares the answer in a response with the record's reference answer, using `math-verify`."""

    def __init__(self, field: str, wrong: Literal["drop", "score"]) -> None:
        self._field, self._wrong = field, wrong
        self._library = import_library("math_verify", "answer verification")

    def check(self, record: Mapping[str, Any], sample: Sample) -> None:
        """Raises Dropped for a wrong answer or an unreadable reference; with wrong="score" sets the sample's score instead."""
        try:
            reference = lookup(record, self._field)
        except MissingField:
            raise Dropped("no reference answer", self._field) from None
        if sample.conversation is None or isinstance(reference, bool) or not isinstance(reference, str | int | float):
            raise Dropped("no reference answer", f"{self._field} is {type(reference).__name__}")
        expected = self._parse(str(reference))
        if not expected:
            raise Dropped("reference answer cannot be read", f"{reference!r:.200}")
        found = self._parse(sample.conversation.texts[-1])
        right = bool(found) and self._library.verify(expected, found)
        if self._wrong == "score":
            sample.score = float(right)
        elif not right:
            raise Dropped(
                "wrong answer", f"expected {expected[-1]!r:.100}, found {found[-1] if found else None!r:.100}"
            )

    def _parse(self, text: str) -> list[Any]:
        # GSM8K puts its answers after ####. Otherwise the last boxed expression or number is the answer.
        return self._library.parse(text.rsplit("####", 1)[-1])


class Signatures:
    """Computes MinHash signatures of texts with `rensa`, in its serialised form."""

    def __init__(self) -> None:
        self._minhash = import_library("rensa", "near-duplicate removal").RMinHash

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        shingles = [_ngrams(text, _SHINGLE) or [text.lower()] for text in texts]
        return [m.__reduce__()[2] for m in self._minhash.from_token_sets(shingles, NUM_PERMUTATIONS, SEED)]
