"""Curation: settings, and the filters on single records: leaked benchmarks, wrong answers; MinHash signatures.

Filters on single records run in the worker processes. Filters that depend on earlier records (`dedup.py`, applied by
`corpus_writer.py`) run in input order.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_iwsft.data.conversation import Conversation
from megatron_iwsft.data.prepare.expressions import MissingField, compile_expression, lookup
from megatron_iwsft.data.prepare.messages import Dropped
from megatron_iwsft.data.prepare.ngrams import Words
from megatron_iwsft.data.prepare.readers import (
    LONGEST_RECORD,
    Input,
    find_inputs,
    fingerprint,
    numbered_records,
    read_blocks,
)
from megatron_iwsft.data.prepare.records import Sample
from megatron_iwsft.data.tokenizer import Tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.mathematics import import_math_verify

NUM_PERMUTATIONS, SEED = 128, 42  # of MinHash
# In words; see `ngrams.py` for scripts without spaces.
_WINDOW = 8  # shared with a benchmark problem, as in s1 (arXiv 2501.19393)
_SHORTEST = 4  # of a problem that is shorter than the window, to be searched in a text
_SHINGLE = 5  # of MinHash
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
                     Its words are as in `ngrams.py`.
    benchmarks       files of benchmark problems; a trajectory whose prompt shares 8 consecutive words with one, or contains all of
                     a shorter one, is dropped
    benchmark_texts  "prompts": what the user says is compared with the problems; "all": every text, also responses and reasoning
    answer_field     field of the record's reference answer, which the response's answer is compared with
    wrong_answers    "drop" drops responses with a wrong answer; "score" keeps all and sets the score to 0 or 1
    max_per_source   keep at most this many trajectories of each source, the first ones
    max_record_bytes   a longer line, or row of Parquet, is dropped without parsing it
    """

    keep: str | None = None
    min_score: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    too_long: Literal["drop", "truncate"] = "drop"
    near_duplicates: float | None = None
    benchmarks: tuple[str, ...] = ()
    benchmark_texts: Literal["prompts", "all"] = "prompts"
    answer_field: str | None = None
    wrong_answers: Literal["drop", "score"] = "drop"
    max_per_source: int | None = None
    max_record_bytes: int = LONGEST_RECORD

    def __post_init__(self) -> None:
        if self.keep is not None:
            compile_expression(self.keep)
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 1:
            raise DataError(
                f"the similarity threshold for near-duplicates must be between 0.3 and 1; found {self.near_duplicates:g}."
            )
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise DataError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}): no trajectory could be kept. "
                "Lower --min-tokens or raise --max-tokens."
            )
        if self.too_long == "truncate" and self.max_tokens is None:
            raise DataError("--too-long truncate needs the number of tokens to keep: give it with --max-tokens.")
        if self.wrong_answers == "score" and self.answer_field is None:
            raise DataError(
                "--wrong-answers score needs the field of the reference answer: name it with --answer-field."
            )

    def manifest_entry(self) -> dict[str, Any]:
        """The settings for the manifest, with benchmark files given by name, hash and number of problems instead of by path."""
        files = find_inputs(self.benchmarks) if self.benchmarks else []
        entries = [{"name": f.name, "sha256": fingerprint(f), **_kinds(read_problems(f).values())} for f in files]
        return {**self.__dict__, "benchmarks": entries}

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


def read_problems(source: Input) -> dict[str, Words]:
    """The words of each problem of a benchmark file, by its name, "file:line". Raises DataError if the file cannot be read."""
    problems = {}
    for block in read_blocks(source):
        for line, record in numbered_records(block):
            where = f"benchmark file {source.path}, line {line}"
            if isinstance(record, Dropped):
                raise DataError(
                    f"{where}: {record.reason}{f' ({record.detail})' if record.detail else ''}. "
                    "Correct or remove the line."
                )
            problem = next((record[f] for f in _PROBLEM_FIELDS if isinstance(record.get(f), str)), None)
            if problem is None:
                raise DataError(f"{where}: a benchmark problem needs one of the fields {', '.join(_PROBLEM_FIELDS)}.")
            problems[f"{source.name}:{line}"] = Words(problem)
    return problems


def _kinds(problems: Iterable[Words]) -> dict[str, int]:
    """The number of problems, and how many of them are compared in which way."""
    counts = Counter(map(_kind, problems))
    return {"problems": counts.total(), **{kind: counts[kind] for kind in ("short", "very_short", "unchecked")}}


def _kind(words: Words) -> Literal["long", "short", "very_short", "unchecked"]:
    """How a problem is searched: by its runs, as a whole within a text, as an entire text, or not at all, since it has no words."""
    if not words:
        return "unchecked"
    return "long" if words.runs(_WINDOW) else "short" if words.runs(_SHORTEST) else "very_short"


class Benchmarks:
    """The problems of all benchmark files, and the search for them.

    A text contains a problem if they share a run of 8 words. A shorter problem of at least 4 words is contained as a whole: all its
    words in a row. An even shorter one has to be the entire text.
    """

    def __init__(self, curation: Curation) -> None:
        self._all_texts = curation.benchmark_texts == "all"
        self._runs: dict[str, str] = {}  # run of 8 words → problem
        self._short: dict[str, list[tuple[str, list[str]]]] = {}  # first 4 words → (problem, all its words)
        self._entire: dict[str, str] = {}  # all words → problem
        for source in find_inputs(curation.benchmarks):
            for name, words in read_problems(source).items():
                self._add(name, words)

    def _add(self, name: str, words: Words) -> None:
        kind = _kind(words)
        if kind == "short":
            self._short.setdefault(words.runs(_SHORTEST)[0], []).append((name, words.texts))
        elif kind == "very_short":
            self._entire.setdefault(str(words), name)
        for run in words.runs(_WINDOW):
            self._runs.setdefault(run, name)

    def check(self, conversation: Conversation) -> bool:
        """Raises Dropped if a text contains a problem. Returns whether any of the texts is as long as a run."""
        pairs = zip(conversation.shape, conversation.texts, strict=True)
        return self._check([text for role, text in pairs if self._all_texts or role == "user"])

    def check_tokens(self, sample: Sample, tokenizer: Tokenizer) -> bool:
        """`check` for token ids: the text of those that are not trained on, or of all."""
        assert sample.tokens is not None and sample.mask is not None
        return self._check([tokenizer.decode(sample.tokens[(sample.mask == 0) | self._all_texts].tolist())])

    def _check(self, texts: Iterable[str]) -> bool:
        long = False
        for text in texts:
            words = Words(text)
            runs = words.runs(_WINDOW)
            long = long or bool(runs)
            for run in runs:
                if run in self._runs:
                    raise Dropped("in a benchmark", f"{self._runs[run]} also has {run!r}")
            for name, problem in self._whole_problems(words):
                raise Dropped("in a benchmark", f"{name} is {' '.join(problem)!r}")
        return long

    def _whole_problems(self, words: Words) -> Iterator[tuple[str, list[str]]]:
        """(name, words) of the short problems that a text contains."""
        if self._entire and (name := self._entire.get(str(words))):
            yield name, words.texts
        for at, run in enumerate(words.runs(_SHORTEST) if self._short else ()):
            for name, problem in self._short.get(run, ()):
                if words.texts[at : at + len(problem)] == problem:
                    yield name, problem


class AnswerCheck:
    """Compares the answer in a response with the record's reference answer, using `math-verify`."""

    def __init__(self, field: str, wrong: Literal["drop", "score"]) -> None:
        self._field, self._wrong = field, wrong
        self._library = import_math_verify()

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
    """Computes MinHash signatures of texts with `rensa`, in its serialised form: of runs of 5 words, or of a shorter text as a whole."""

    def __init__(self) -> None:
        self._minhash = import_library("rensa", "near-duplicate removal").RMinHash

    def __call__(self, texts: Sequence[str]) -> list[bytes | None]:
        """One signature per text; None if it has no words."""
        words = [Words(text) for text in texts]
        shingles = [w.runs(_SHINGLE) or [str(w)] for w in words]
        hashes = self._minhash.from_token_sets(shingles, NUM_PERMUTATIONS, SEED)
        return [h.__reduce__()[2] if w else None for h, w in zip(hashes, words, strict=True)]
