"""Tokenizers: one small interface over a Hugging Face `tokenizer.json` directory or a SentencePiece `.model` file.

Each piece of text (prompt, response, prompt, …) is encoded separately, because inference tokenizes the prompt alone and
generates from there. So no token spans the boundary between prompt and response.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import (
    Any,
    NotRequired,  # pydantic asks for this one before Python 3.12
)

import numpy as np
from typing_extensions import TypedDict

from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.files import read_regular
from megatron_iwsft.utils.json_files import KEEP_UNKNOWN_KEYS, read_json

CHAT_TEMPLATE = "chat_template.jinja"
# The files beside tokenizer.json, all optional. They are copied into corpora and exports.
_MAX_VOCAB = 1 << 24
_MODEL_NAME = re.compile(r"\.model(\.v\d+(m\d+)?)?$|\.tiktoken$|^tekken.*\.json$")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
# What to do with files that do not hold a complete tokenizer.
_CONVERT_TEKKEN = (
    'python -c "from transformers.integrations.mistral import convert_tekken_tokenizer as convert; '
    "convert('{}').save_pretrained('OUTPUT')\""
)
_CONVERT_TIKTOKEN = (
    'pip install tiktoken; python -c "from transformers.convert_slow_tokenizer import TikTokenConverter as Convert; '
    "Convert('{}', extra_special_tokens=TOKENS).converted().save('tokenizer.json')\", where TOKENS lists the texts of the model's "
    "special tokens in the order of their ids, which the file does not have"
)
_INSTEAD_OF_QWEN = "Use the tokenizer.json of Qwen/Qwen2.5-7B: its tokens have the same ids"
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)


class Tokenizer(ABC):
    """The interface that sharding and inspection use.

    fingerprint      SHA-256 of the file that determines the token ids (the chat template has a separate hash)
    vocab_size       largest id + 1
    special             texts of the special tokens, one of which ends a turn
    special_pattern     matches any of them in a text
    control             texts of the special and of all other added tokens except whitespace: the content of a message must not
                        contain them, whether the tokenizer's file calls them special (`<|im_end|>`) or not (`<tool_call>`)
    control_ids         their ids, without that of the unknown token
    control_pattern     matches any of them in a text
    unknown             text and id of the token that stands for text without a token of its own; None if there is none
    unwritable          matches, in a text's UTF-8, the bytes for which a byte-level vocabulary has no token; None if it has all.
                        The library leaves them out without a word
    template_variables  the special tokens that a chat template may write, by their names (`bos_token`, …)
    files               the tokenizer's files, for `copy_to`
    """

    fingerprint: str
    vocab_size: int
    special: frozenset[str]
    special_pattern: re.Pattern[str]
    control: frozenset[str]
    control_ids: list[int]
    control_pattern: re.Pattern[str]
    unknown: tuple[str, int] | None
    unwritable: re.Pattern[bytes] | None
    template_variables: dict[str, str]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    files: list[Path]

    @abstractmethod
    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece of one rendered text. Special tokens are recognised; none are added."""

    def encode_batch(self, texts: Sequence[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`encode_pieces` for many rendered texts: `texts` holds the pieces of all of them, counts[i] pieces for text i.

        Returns the ids, int32 [total], and the number of ids of each piece, int64 [len(texts)].
        """
        ids, at = [], 0
        for count in counts:
            ids += self.encode_pieces(texts[at : at + count])
            at += count
        return _flatten(ids)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, including special tokens."""

    def copy_to(self, directory: Path) -> None:
        """Copy the tokenizer's files into `directory`. Raises DataError if one no longer exists."""
        directory.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if not file.is_file():
                raise DataError(
                    f"the tokenizer's file {file} no longer exists. Restore it and run the same command again."
                )
            shutil.copyfile(file, directory / ("tokenizer.model" if ".model" in file.name else file.name))

    def _compile_patterns(self) -> None:
        self.special_pattern, self.control_pattern = any_of(self.special), any_of(self.control)

    def ends_with_special(self, text: str) -> int | None:
        """Length of `text` up to and including its last special token if only whitespace follows it, else None."""
        ends = [match.end() for match in self.special_pattern.finditer(text)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else None


class HuggingFaceTokenizer(Tokenizer):
    """A directory with `tokenizer.json`."""

    def __init__(self, directory: Path) -> None:
        import tokenizers

        path = directory / "tokenizer.json"
        content = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a bare Exception, or a panic of its Rust code, which is no Exception
            raise DataError(f"{path} cannot be read as a tokenizer: {error}. Download or create it again.") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.json = content
        definition = json.loads(content)
        self.adds_space = _adds_space(definition)
        self.unknown, self.unwritable = self._unknown(definition["model"]), self._unwritable(definition)
        config = _read_config(directory)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MAX_VOCAB:
            raise DataError(
                f"{path} has a vocabulary of {self.vocab_size:,} tokens; supported are 1 to {_MAX_VOCAB:,}."
            )
        added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.content}
        self.special = frozenset(token.content for token in added.values() if token.special)
        # Several tokenizers add runs of whitespace as tokens, which SentencePiece writes as ▁.
        self.control = self.special | {t.content for t in added.values() if t.content.strip("▁ \t\r\n")}
        unknown = {_token_text(config.get("unk_token")), getattr(self._tokenizer.model, "unk_token", None)}
        self.control_ids = sorted(i for i, t in added.items() if t.content in self.control - unknown)
        self.template_variables = {
            name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None
        }
        self.bos_token = self.template_variables.get("bos_token")
        self.eos_token = self.template_variables.get("eos_token")
        self.chat_template = _chat_template(directory, config)
        self.files = _with_config_files(path)
        self._compile_patterns()

    def _unknown(self, model: Mapping[str, Any]) -> tuple[str, int] | None:
        if model.get("type") == "Unigram":
            number = model.get("unk_id")
            text = None if number is None else self._tokenizer.id_to_token(number)
        else:
            text = model.get("unk_token")
            number = None if text is None else self._tokenizer.token_to_id(text)
        return None if text is None or number is None else (text, number)

    def _unwritable(self, definition: Mapping[str, Any]) -> re.Pattern[bytes] | None:
        if not _has_type(definition.get("pre_tokenizer"), "ByteLevel"):
            return None
        missing = [b for b, symbol in _byte_symbols() if self._tokenizer.token_to_id(symbol) is None]
        return re.compile(b"[%s]" % b"".join(b"\\x%02x" % b for b in missing)) if missing else None

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._encode_pieces(texts)
        except Exception as error:  # the library raises a bare Exception
            raise DataError(
                f"the tokenizer {self.files[0]} cannot encode a text: {error}. "
                "Check the tokenizer's files, or remove the text."
            ) from None

    def _encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.adds_space:
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        # This tokenizer adds a space before every text it encodes, but only the first piece begins a text. So the full text
        # is encoded, and each token belongs to the piece that contains its first character.
        full = self._tokenizer.encode("".join(texts), add_special_tokens=False)
        ends = np.cumsum([len(text) for text in texts])
        piece = np.searchsorted(ends, [min(start, ends[-1] - 1) for start, _ in full.offsets], side="right")
        return [np.asarray(full.ids)[piece == k].tolist() for k in range(len(texts))]

    def encode_batch(self, texts: Sequence[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return super().encode_batch(texts, counts) if self.adds_space else _flatten(self.encode_pieces(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. Its control pieces (such as <s> and </s>) are the special tokens.

    The chat template is that of the files beside it, as with `tokenizer.json`.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        content = _read(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            # SentencePiece adds a space before a text. Later pieces continue the text, so they are encoded without it.
            model = ModelProto.FromString(content)
            self.adds_space = model.normalizer_spec.add_dummy_prefix
            model.normalizer_spec.add_dummy_prefix = False
            model.normalizer_spec.remove_extra_whitespaces = False
            self.continuation_model = model.SerializeToString()
            self._continuation = sentencepiece.SentencePieceProcessor(model_proto=self.continuation_model)
        except (DecodeError, RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read as a SentencePiece model: {error}. Download or create it again."
            ) from None
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._processor.get_piece_size()
        self._control = {
            self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)
        }
        unknown = self._processor.unk_id()
        self.unknown = (self._processor.id_to_piece(unknown), unknown) if unknown >= 0 else None
        self.unwritable = None
        self.special = frozenset(self._control)
        defined = {
            p.piece: i for i, p in enumerate(model.pieces) if p.type == p.USER_DEFINED and p.piece.strip("▁ \t\r\n")
        }
        self.control = self.special | frozenset(defined)
        self.control_ids = sorted([*self._control.values(), *defined.values()])
        self.bos_token = self._piece(self._processor.bos_id())
        self.eos_token = self._piece(self._processor.eos_id())
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        self.template_variables = {name: text for name, text in tokens.items() if text is not None}
        self.chat_template = _chat_template(path.parent, _read_config(path.parent))
        self.files = _with_config_files(path)
        self._compile_patterns()
        self._split = re.compile(f"({self.special_pattern.pattern})")

    def _piece(self, i: int) -> str | None:
        return self._processor.id_to_piece(i) if i >= 0 else None

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        out, first = [], True
        for text in texts:
            ids: list[int] = []
            for part in self._split.split(text):
                if part in self._control:
                    ids.append(self._control[part])
                elif part:
                    ids.extend((self._processor if first else self._continuation).encode(part))
                    first = False
            out.append(ids)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        run: list[int] = []
        for i in [*ids, -1]:
            piece = self._processor.id_to_piece(i) if 0 <= i < self.vocab_size else ""
            if i < 0 or piece in self._control:
                out.append(self._processor.decode(run))
                out.append(piece)
                run = []
            else:
                run.append(int(i))
        return "".join(out)


def any_of(texts: frozenset[str]) -> re.Pattern[str]:
    """A pattern that matches any of `texts`, the longest where several do; nothing if there is none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _flatten(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _adds_space(part: Any) -> bool:
    """Whether any normalizer or pre-tokenizer of a tokenizer.json adds a space before the text."""
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "Prepend" or (kind == "ByteLevel" and part.get("add_prefix_space") and "use_regex" in part):
            return True
        if kind == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
        return any(
            _adds_space(part[key])
            for key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
            if part.get(key)
        )
    return isinstance(part, list) and any(_adds_space(item) for item in part)


def _has_type(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer.json is of this type, or has one that is inside."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_type(inner, kind) for inner in part.values())
    return isinstance(part, list) and any(_has_type(inner, kind) for inner in part)


def _byte_symbols() -> Iterator[tuple[int, str]]:
    """Each byte that UTF-8 uses, with the character by which a byte-level vocabulary writes it (as GPT-2's does)."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    for byte in range(0x100):
        symbol = chr(byte if byte in itself else next(others))
        if byte not in (0xC0, 0xC1) and byte < 0xF5:
            yield byte, symbol


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a Hugging Face directory, a `tokenizer.json`, a SentencePiece model (`tokenizer.model`, or as Mistral names them
    `tokenizer.model.v3`), or a directory with `tokenizer.model`.

    Raises DataError if `path` is none of these; for tiktoken and tekken files it says how to convert them.
    """
    path = Path(path)
    if path.name == "tokenizer.json":
        path = path.parent
    if (path / "tokenizer.json").is_file():
        return HuggingFaceTokenizer(path)
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    models = [p for p in found if _MODEL_NAME.search(p.name) and p.is_file()]
    if not models:
        raise DataError(
            f"no tokenizer at {path}: expected a directory with tokenizer.json or tokenizer.model, or a SentencePiece .model file."
        )
    if len(models) > 1 and path / "tokenizer.model" not in models:
        raise DataError(
            f"{path} has several tokenizers: {', '.join(m.name for m in models)}. Give the path of one of them."
        )
    model = path / "tokenizer.model" if path / "tokenizer.model" in models else models[0]
    if model.name.startswith("tekken"):
        raise DataError(
            f"{model} is a tekken file. Convert it: {_CONVERT_TEKKEN.format(model)}. Give the directory OUTPUT."
        )
    if _TIKTOKEN.match(_read(model)):
        way = _INSTEAD_OF_QWEN if model.name.startswith("qwen") else f"Convert it: {_CONVERT_TIKTOKEN.format(model)}"
        raise DataError(f"{model} is a tiktoken file. {way}.")
    return SentencePieceTokenizer(model)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Check that it exists and that you may read it."
        ) from None


class _TokenConfig(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    content: str


class _NamedTemplate(TypedDict):
    name: str
    template: str


_Token = str | _TokenConfig | None


class _Config(TypedDict):
    __pydantic_config__ = KEEP_UNKNOWN_KEYS  # type: ignore[misc]
    bos_token: NotRequired[_Token]
    eos_token: NotRequired[_Token]
    unk_token: NotRequired[_Token]
    sep_token: NotRequired[_Token]
    pad_token: NotRequired[_Token]
    cls_token: NotRequired[_Token]
    mask_token: NotRequired[_Token]
    chat_template: NotRequired[str | list[_NamedTemplate] | None]


def _read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json with the non-empty values of special_tokens_map.json, as far as they exist."""
    out: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            found = read_json(directory / name, _Config, DataError, advice="Download or export the tokenizer again.")
            out |= {key: value for key, value in found.items() if value or name == "tokenizer_config.json"}
    return out


def _with_config_files(path: Path) -> list[Path]:
    return [path, *(path.parent / name for name in _CONFIG_FILES if (path.parent / name).exists())]


def _token_text(value: Any) -> str | None:
    return value["content"] if isinstance(value, dict) else value


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE
    if path.exists():
        try:
            return _read(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # a list of named templates
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template
