"""Fast encoding with `gigatoken`, which is much faster than the tokenizers' own libraries.

It is used only if it gives the same ids as the tokenizer's own library on a sample of the inputs (`choose_encoder`). While the
corpus is being written, some texts are still encoded by both libraries; a difference stops the run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np
import regex

from megatron_iwsft.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_iwsft.errors import DataError

# One text in this many is encoded by both libraries while the corpus is being written.
_CHECK_EVERY = 2000

# Compared in addition to the sample: texts that tokenizers tend to treat differently.
HARD_TEXTS = (
    "tabs\tand  runs   of    spaces \n\n\n  indented\r\n\u00a0no-break\u3000wide",
    "It's we'll THEY'VE don\u2019t 1234567890 3.14159 1,000,000 \u0664\u0662 \u00bd x\u00b2",
    "e\u0301 \u00e9 \ufb01 \u212b \uac00 \u1100\u1161 \u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b\ufeff \x00\x07 \ud7ff\ue000\ufffd \U0010ffff",
    "\\frac{a}{b} $x_{1}^{2}$ <think> </think> <|not_special|> def f(x):\n\treturn x**2  # ok",
    "a" * 300 + " " * 70 + "=" * 130,
)

# Characters that gigatoken and the `tokenizers` library normalise (NFC) by different versions of Unicode: combining marks and
# composing letters that are newer than the tables of the latter. Texts that contain one are encoded by the tokenizer's own library.
# Found by comparing both libraries in these versions.
_COMPARED = {"gigatoken": "0.10.0", "tokenizers": "0.23.3"}
_NEWER_MARKS = re.compile(
    "[\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1aeb\u1df6-\u1dfa\ua82c"
    "\U000105c0-\U000105ff\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab-\U00010eac\U00010efa-\U00010eff"
    "\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U00011380-\U000113ff\U0001145e\U00011839-\U0001183a"
    "\U00011900-\U0001195f\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42-\U00011d45\U00011d97\U00011f41-\U00011f42"
    "\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0-\U00016ff1\U0001e08f\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee-\U0001e5ef\U0001e6e3-\U0001e6f5]"
)


# In other versions it may be any mark, and any character that is newer than the tables of `regex`.
_ANY_MARK = regex.compile(r"[\p{M}\p{Cn}]")


def _may_differ() -> Callable[[str], bool]:
    """Whether the libraries may normalise a text differently."""
    if {name: version(name) for name in _COMPARED} == _COMPARED:
        return lambda text: _NEWER_MARKS.search(text) is not None
    return lambda text: _NEWER_MARKS.search(text) is not None or _ANY_MARK.search(text) is not None


class Encoder(Protocol):
    """A function like `Tokenizer.encode_batch`, from any library."""

    def __call__(self, texts: Sequence[str], counts: Sequence[int], /) -> tuple[np.ndarray, np.ndarray]: ...


def gigatoken_encoder(tokenizer: Tokenizer) -> Encoder | str:
    """A gigatoken encoder for `tokenizer`, not yet compared with it, or the reason why there is none."""
    try:
        import gigatoken
    except ImportError:
        return "gigatoken is not installed"
    try:
        if isinstance(tokenizer, HuggingFaceTokenizer):
            if tokenizer.adds_space:
                return "this tokenizer adds a space before every text"
            return _HuggingFaceEncoder(tokenizer, gigatoken.Tokenizer.from_json(tokenizer.json))
        assert isinstance(tokenizer, SentencePieceTokenizer)
        return _SentencePieceEncoder(tokenizer, gigatoken.Tokenizer.from_sentencepiece(tokenizer.continuation_model))
    except Exception as error:  # gigatoken's Rust code may raise anything; the tokenizer's own library is used instead
        return f"gigatoken cannot read this tokenizer: {str(error).splitlines()[0]}"


def choose_encoder(tokenizer: Tokenizer, texts: Sequence[str], counts: Sequence[int]) -> tuple[bool, str]:
    """Whether to use gigatoken, decided on a sample of texts (given as in `encode_batch`), and the reason, for the log."""
    encoder = gigatoken_encoder(tokenizer)
    library = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "tokenizers"
    if isinstance(encoder, str):
        return False, f"encoding with {library}: {encoder}"
    texts, counts = [*texts, *HARD_TEXTS], [*counts, *[1] * len(HARD_TEXTS)]
    expected = tokenizer.encode_batch(texts, counts)
    try:
        difference = _first_difference(texts, expected, encoder(texts, counts))
    except Exception as error:
        return False, f"encoding with {library}: gigatoken failed on the sample: {error}"
    if difference:
        return False, f"encoding with {library}: gigatoken gives different ids, for example for {difference!r:.80}"
    sample = f"{len(counts) - len(HARD_TEXTS):,} texts of the inputs ({len(expected[0]):,} tokens)"
    return True, f"encoding with gigatoken: its ids equal those of {library} on a sample of {sample}"


class CheckedEncoder:
    """gigatoken, with some texts of each call checked against the tokenizer's own library. Raises DataError if they differ."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder

    def __call__(self, texts: Sequence[str], counts: Sequence[int], /) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self._encoder(texts, counts)
        firsts = [0, *itertools.accumulate(counts)]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for i in range(0, len(counts), _CHECK_EVERY):
            a, b = firsts[i], firsts[i + 1]
            found = ids[ends[a] : ends[b]], lengths[a:b]
            difference = _first_difference(texts[a:b], self._tokenizer.encode_batch(texts[a:b], [b - a]), found)
            if difference:
                raise DataError(
                    f"gigatoken and the tokenizer's own library give different ids for {difference!r:.200}, although they agreed on the "
                    "sample at the start. Run the command again with --encoder own --restart."
                )
        return ids, lengths


def _first_difference(
    texts: Sequence[str], expected: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]
) -> str | None:
    if all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
        return None
    pairs = zip(*(np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (expected, found)), strict=True)
    return next(text for text, (a, b) in zip(texts, pairs, strict=True) if not np.array_equal(a, b))


class _HuggingFaceEncoder:
    def __init__(self, tokenizer: HuggingFaceTokenizer, backend: object) -> None:
        self._tokenizer, self._backend = tokenizer, backend
        self._may_differ = _may_differ()
        self._normalizes = re.search(rb'"type"\s*:\s*"NFK?[CD]"', tokenizer.json) is not None

    def __call__(self, texts: Sequence[str], counts: Sequence[int], /) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = _encode(self._backend, texts)
        if not self._normalizes:
            return ids, lengths
        differ = [k for k, text in enumerate(texts) if not text.isascii() and self._may_differ(text)]
        if not differ:
            return ids, lengths
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        for k, own in zip(differ, self._tokenizer.encode_pieces([texts[k] for k in differ]), strict=True):
            pieces[k] = np.asarray(own, np.int32)
        return np.concatenate(pieces), np.asarray([len(piece) for piece in pieces], np.int64)


class _SentencePieceEncoder:
    """Encodes all pieces with the model that adds no leading space. If the tokenizer adds one, it is inserted here."""

    def __init__(self, tokenizer: SentencePieceTokenizer, backend: object) -> None:
        self._backend, self._space = backend, tokenizer.adds_space
        self._leading = re.compile(f"(?:{tokenizer.special_pattern.pattern})*").match

    def __call__(self, texts: Sequence[str], counts: Sequence[int], /) -> tuple[np.ndarray, np.ndarray]:
        return _encode(self._backend, self._with_spaces(list(texts), counts) if self._space else texts)

    def _with_spaces(self, texts: list[str], counts: Sequence[int]) -> list[str]:
        at = 0
        for count in counts:
            for k in range(at, at + count):
                text = texts[k]
                end = self._leading(text).end()  # type: ignore[union-attr]
                if end < len(text):
                    texts[k] = f"{text[:end]} {text[end:]}"
                    break
            at += count
        return texts


def _encode(backend: object, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    if not texts:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    # Single-threaded: parallelism comes from the worker processes. Reading the flat buffers of the layout avoids building the slow
    # array class.
    layout = backend.encode_batch(list(texts), parallel=False).layout  # type: ignore[attr-defined]
    return np.asarray(layout.content.data).view(np.int32), np.diff(np.asarray(layout.offsets.data)).astype(np.int64)
