"""Records: one line of input → trajectories of tokens, masks and scores, or a reason why not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_iwsft.data.templates import ChatTemplate, TemplateError
from megatron_iwsft.data.tokenizer import Tokenizer
from megatron_iwsft.errors import DataError

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class Dropped(ValueError):
    """A record that is not taken. `reason` is a short phrase that is counted; `detail` says more about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Trajectory:
    """tokens int [n]; mask uint8 [n], 1 where trained on; content_hash hex of SHA-256 over both."""

    id: str
    tokens: np.ndarray
    mask: np.ndarray
    score: float | None
    content_hash: str


@dataclass(frozen=True)
class RecordFormat:
    """Where a record keeps what. Field names may be dotted paths into nested objects.

    A record with `messages` is a chat, one with `input_ids` is already tokenized, any other is a prompt with one response per
    entry of `response_fields` (several sampled solutions of one problem); `score_fields` is empty, or one for all responses,
    or one for each.
    """

    prompt_field: str = "prompt"
    response_fields: tuple[str, ...] = ("response",)
    score_fields: tuple[str, ...] = ()
    min_score: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.score_fields) not in (0, 1, len(self.response_fields)):
            raise DataError(
                f"{len(self.response_fields)} response fields take none, one or as many score fields, not {len(self.score_fields)}."
            )
        if self.min_score is not None and not self.score_fields:
            raise DataError("--min-score needs --score-field: without it there is nothing to compare.")


class RecordReader:
    """Turns lines into trajectories. One per worker process."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, record_format: RecordFormat) -> None:
        self.tokenizer, self.template, self.format = tokenizer, template, record_format

    def read(self, line: bytes, where: str) -> Iterator[Trajectory | Dropped]:
        """Every trajectory of one JSON line, each taken or dropped with its reason. `where` makes ids for records without one."""
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Dropped("not UTF-8", str(error))
            return
        except (ValueError, RecursionError) as error:
            yield Dropped("not JSON", str(error))
            return
        if not isinstance(record, dict):
            yield Dropped("not a JSON object", f"found {type(record).__name__}")
            return
        name = str(record["id"]) if record.get("id") is not None else where
        chat_or_tokens = "messages" in record or "input_ids" in record
        count = 1 if chat_or_tokens else len(self.format.response_fields)
        for k in range(count):
            try:
                yield self._one(record, k, name if count == 1 else f"{name}#{k}")
            except Dropped as dropped:
                yield dropped

    def _one(self, record: dict[str, Any], k: int, name: str) -> Trajectory:
        score = self._score(record, k)
        if "input_ids" in record:
            tokens, mask = self._tokenized(record)
        else:
            messages = _messages(record["messages"]) if "messages" in record else self._pair(record, k)
            tokens, mask = self._render(messages)
        trained = int(mask.sum())
        if trained == 0:
            raise Dropped("nothing to train on", "the loss mask is all zeros")
        if trained == len(mask):
            raise Dropped("no prompt", "the loss mask is all ones")
        limit = self.format.max_tokens
        if limit is not None and len(tokens) > limit:
            raise Dropped("too long", f"{len(tokens)} tokens; the limit is {limit}")
        digest = hashlib.sha256(tokens.astype("<i4").tobytes() + mask.tobytes()).hexdigest()
        return Trajectory(id=name, tokens=tokens, mask=mask, score=score, content_hash=digest)

    def _score(self, record: dict[str, Any], k: int) -> float | None:
        fields = self.format.score_fields
        if not fields:
            return None
        name = fields[k] if len(fields) > 1 else fields[0]
        value = _lookup(record, name)
        if not isinstance(value, bool | int | float):
            raise Dropped("score is not a number", f"{name} is {value!r:.80}")
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise Dropped("score is not a number", f"{name} is {value!r:.80}")
        if self.format.min_score is not None and score < self.format.min_score:
            raise Dropped("score too low", f"{score:g} < {self.format.min_score:g}")
        return score

    def _pair(self, record: dict[str, Any], k: int) -> list[dict[str, str]]:
        out = []
        for role, name in (("user", self.format.prompt_field), ("assistant", self.format.response_fields[k])):
            value = _lookup(record, name)
            if not isinstance(value, str):
                raise Dropped("field is not text", f"{name} is {type(value).__name__}")
            out.append({"role": role, "content": value})
        if not out[0]["content"].strip():
            raise Dropped("empty prompt", f"field {self.format.prompt_field}")
        return out

    def _render(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        if self.template is None:
            raise Dropped("no chat template", "the first record was already tokenized, this one is text")
        for message in messages:
            if message["role"] == "assistant" and not message["content"].strip():
                raise Dropped("empty response")
            try:
                message["content"].encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                raise Dropped("not valid Unicode", str(error)) from None
            found = self.tokenizer.special_in(message["content"])
            if found:
                raise Dropped("special token in content", f"{found!r} stands in a {message['role']} turn")
        if not any(m["role"] == "assistant" for m in messages):
            raise Dropped("no assistant turn")
        try:
            pieces = self.template.pieces(messages)
        except TemplateError as error:
            raise Dropped("template cannot render it", str(error)) from None
        encoded = self.tokenizer.encode_pieces([text for text, _ in pieces])
        tokens = np.concatenate([np.asarray(ids, np.int64) for ids in encoded])
        mask = np.repeat([int(trained) for _, trained in pieces], [len(ids) for ids in encoded]).astype(np.uint8)
        return tokens, mask

    def _tokenized(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = record["input_ids"], record.get("loss_mask")
        if not _is_list_of_int(ids):
            raise Dropped("input_ids is not a list of integers")
        if mask is None or not _is_list_of_int(mask) or not set(mask) <= {0, 1}:
            raise Dropped("loss_mask is not a list of zeros and ones")
        if len(ids) != len(mask):
            raise Dropped("input_ids and loss_mask differ in length", f"{len(ids)} and {len(mask)}")
        if ids and not (min(ids) >= 0 and max(ids) < self.tokenizer.vocab_size):
            raise Dropped(
                "token outside the vocabulary",
                f"ids go up to {max(ids)}, the vocabulary to {self.tokenizer.vocab_size - 1}",
            )
        return np.asarray(ids, np.int64), np.asarray(mask, np.uint8)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Dropped("messages is not a list")
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, Mapping) else type(message).__name__
        if not isinstance(message, Mapping) or not isinstance(role, str) or role not in _ROLES:
            raise Dropped("message without a known role", f"message {i}: {role!r:.60}")
        if not isinstance(message.get("content"), str):
            raise Dropped("message without text", f"message {i}: content is {type(message.get('content')).__name__}")
    return value


def _lookup(record: Mapping[str, Any], path: str) -> Any:
    """The value at dotted `path`; a field whose name contains the dots itself comes first."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Dropped("missing field", path)
        value = value[part]
    return value


def _is_list_of_int(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)
