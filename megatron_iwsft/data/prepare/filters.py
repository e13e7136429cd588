"""Curation: what of a corpus is kept, beside the quality threshold: lengths, duplicates, leaked benchmarks, wrong answers.

What looks at one record alone runs in the worker processes; what looks at earlier ones (`seen.py`) in input order.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_iwsft.data.chat_template import Conversation
from megatron_iwsft.data.prepare.expressions import MissingField, compile_expression, lookup
from megatron_iwsft.data.prepare.readers import find_inputs, fingerprint, read_blocks, rows_of
from megatron_iwsft.data.prepare.records import Dropped, Sample, parse
from megatron_iwsft.errors import DataError

NGRAM = 8
NUM_PERMUTATIONS, SEED = 128, 42  # of MinHash
_SHINGLE = 5  # words
_PROBLEM_FIELDS = ("problem", "question", "prompt", "text")


@dataclass(frozen=True)
class Curation:
    """What is kept. Everything that is not is listed in dropped.jsonl with its reason.

    keep             expression over a record's fields that must hold
    min_score        the least score
    min_tokens, max_tokens   bounds of a trajectory's length
    near_duplicates  drop a trajectory whose words resemble an earlier one's at least this much (Jaccard similarity of 5-grams of
                     words, estimated by MinHash), 0 … 1; None not to look. Exact duplicates are always dropped.
    benchmarks       files of benchmark problems; a trajectory whose prompt shares 8 words in a row with one is dropped
    answer_field     the record's reference answer; a response that does not arrive at it is dropped, or, with
    wrong_answers    "score", given the score 0 (and a right one 1)
    max_per_source   the first so many trajectories of each source are kept
    """

    keep: str | None = None
    min_score: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    near_duplicates: float | None = None
    benchmarks: tuple[str, ...] = ()
    answer_field: str | None = None
    wrong_answers: Literal["drop", "score"] = "drop"
    max_per_source: int | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            compile_expression(self.keep)
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise DataError(f"near-duplicates are found from a similarity of 0.3 to 1, not {self.near_duplicates:g}.")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise DataError(f"no trajectory has at least {self.min_tokens} tokens and at most {self.max_tokens}.")
        if self.wrong_answers == "score" and self.answer_field is None:
            raise DataError(
                "wrong answers can be scored only where the field of the reference answer is named (--answer-field)."
            )

    def described(self) -> dict[str, Any]:
        """For the manifest: the settings, with the benchmark files by name and content instead of path."""
        files = find_inputs(self.benchmarks) if self.benchmarks else []
        return {**self.__dict__, "benchmarks": [{"name": f.name, "sha256": fingerprint(f)} for f in files]}

    def check_libraries(self) -> None:
        """Raises DataError if a library that a step needs is not installed."""
        if self.near_duplicates is not None:
            import_library("rensa", "near-duplicate removal")
        if self.answer_field is not None:
            import_library("math_verify", "answer verification")


def import_library(name: str, purpose: str) -> Any:
    """An optional package. Raises DataError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{purpose} needs the package {name.replace('_', '-')}: pip install 'megatron-iwsft[curation]'."
        ) from None


class Benchmarks:
    """Every run of 8 words of the benchmark problems, as in s1 (arXiv 2501.19393): lower case, cut at white space."""

    def __init__(self, files: Sequence[str]) -> None:
        self._problem_of: dict[str, str] = {}
        self.too_short = 0
        for source in find_inputs(files):
            for block in read_blocks(source):
                for at, record in enumerate(_records(block.content()), block.first + 1):
                    problem = next((record[f] for f in _PROBLEM_FIELDS if isinstance(record.get(f), str)), None)
                    if problem is None:
                        raise DataError(
                            f"{source.path}, line {at}: a benchmark problem has one of the fields {', '.join(_PROBLEM_FIELDS)}."
                        )
                    grams = _ngrams(problem, NGRAM)
                    self.too_short += not grams
                    for gram in grams:
                        self._problem_of.setdefault(gram, f"{source.name}:{at}")

    def check(self, conversation: Conversation) -> None:
        """Raises Dropped if a user's turn shares 8 words in a row with a problem."""
        known = self._problem_of
        for role, text in zip(conversation.shape, conversation.texts, strict=True):
            if role == "user":
                for gram in _ngrams(text, NGRAM):
                    if gram in known:
                        raise Dropped("in a benchmark", f"{known[gram]} has {gram!r} too")


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
    """Compares the answer that a response arrives at with the record's reference answer, by `math-verify`."""

    def __init__(self, field: str, wrong: Literal["drop", "score"]) -> None:
        self._field, self._wrong = field, wrong
        self._library = import_library("math_verify", "answer verification")

    def check(self, record: Mapping[str, Any], sample: Sample) -> None:
        """Raises Dropped for a wrong answer or a reference that cannot be read; or sets the sample's score."""
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
        # GSM8K puts its answers after ####; otherwise the last boxed expression or number counts.
        return self._library.parse(text.rsplit("####", 1)[-1])


class Signatures:
    """MinHash signatures of texts by `rensa`, in its own serialised form."""

    def __init__(self) -> None:
        self._minhash = import_library("rensa", "near-duplicate removal").RMinHash

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        shingles = [_ngrams(text, _SHINGLE) or [text.lower()] for text in texts]
        return [m.__reduce__()[2] for m in self._minhash.from_token_sets(shingles, NUM_PERMUTATIONS, SEED)]
