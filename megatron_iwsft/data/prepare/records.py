"""Read an input record as samples (a conversation or tokens, with a score), or drop it with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from megatron_iwsft.data.chat_template import Conversation, Rendering
from megatron_iwsft.data.prepare.expressions import Evaluate, MissingField, compile_expression, lookup
from megatron_iwsft.errors import DataError

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# Names of an assistant's reasoning in public corpora. Templates use the first.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EVALUATION_ERRORS = (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError, MemoryError)
# Keys of a message that a template may render beside its text.
_NON_TEXT_KEYS = ("tool_calls", "tool_call_id", "name")


NESTED = "nested too deeply", "more levels than Python's recursion limit"


class Dropped(ValueError):
    """A record that is dropped. `reason` is a short phrase that is counted; `detail` is specific to this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail
        self.id: str | None = None  # as in Sample
        self.number: int | None = None


@dataclass(frozen=True)
class RecordFormat:
    """The fields of a record. Field names may be dotted paths into nested objects.

    A record with `messages` is a chat, one with `input_ids` is already tokenized, any other is a prompt with one response per
    entry of `response_fields` (several sampled solutions of one problem). `reasoning_fields` and `score_fields` are empty, or
    hold one entry for all responses or one per response. A score is a field or an expression over fields (`expressions.py`).

    source_field   field that holds the record's source; by default the source is the first part of the response field's path
                   if there are several response fields, else the input file
    source_scores  (source, expression) pairs that replace `score_fields` for these sources
    rendering      how conversations are rendered and which turns are trained on
    """

    prompt_field: str = "prompt"
    response_fields: tuple[str, ...] = ("response",)
    reasoning_fields: tuple[str, ...] = ()
    system_field: str | None = None
    score_fields: tuple[str, ...] = ()
    source_field: str | None = None
    source_scores: tuple[tuple[str, str], ...] = ()
    rendering: Rendering = field(default_factory=Rendering)

    def __post_init__(self) -> None:
        responses = len(self.response_fields)
        for kind, fields in (("score", self.score_fields), ("reasoning", self.reasoning_fields)):
            if len(fields) not in (0, 1, responses):
                raise DataError(
                    f"for {responses} response fields, give no {kind} field, one, or {responses}; found {len(fields)}."
                )
        for expression in (*self.score_fields, *(e for _, e in self.source_scores)):
            compile_expression(expression)


# s1K-1.1 as in the s1 paper (arXiv 2501.19393): the thinking trajectory and the attempt under separate headings.
PRESETS = {
    "s1k-1.1": RecordFormat(
        prompt_field="question",
        reasoning_fields=("deepseek_thinking_trajectory",),
        response_fields=("deepseek_attempt",),
        rendering=Rendering(thinking=("<|im_start|>think\n", "\n<|im_start|>answer\n")),
    )
}


@dataclass(slots=True)
class Sample:
    """A trajectory before rendering: a conversation, or token ids (int32) with their mask (uint8).

    `number` is the index among several samples of one record, None if there is only one.
    """

    id: str | None
    number: int | None
    source: str | None
    score: float | None
    conversation: Conversation | None = None
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None


def parse(line: bytes) -> dict[str, Any]:
    """Parse a line of JSON as a record. Raises Dropped if it is not a JSON object."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_with_json(line)
    if type(record) is not dict:
        raise Dropped("not a JSON object", f"found {type(record).__name__}")
    return record


def _parse_with_json(line: bytes) -> Any:
    """Parse with the standard library: it accepts more than orjson (NaN, very long integers) and has clearer error messages."""
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Dropped("not UTF-8", str(error)) from None
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise Dropped("not valid Unicode", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Dropped("not JSON", str(error)) from None
    return record


class RecordReader:
    """Reads records as samples. `keep` and `min_score` are as in `Curation`."""

    def __init__(self, record_format: RecordFormat, *, keep: str | None = None, min_score: float | None = None) -> None:
        self.format, self.min_score = record_format, min_score
        self.keep = compile_expression(keep) if keep else None
        self._keep_text = keep
        self._scores = [compile_expression(e) for e in record_format.score_fields]
        self._source_scores = {source: compile_expression(e) for source, e in record_format.source_scores}
        reasoning = record_format.reasoning_fields
        self._responses = [  # (response field, reasoning field or None)
            (name, reasoning[k if len(reasoning) > 1 else 0] if reasoning else None)
            for k, name in enumerate(record_format.response_fields)
        ]

    def read(self, record: Mapping[str, Any]) -> list[Sample | Dropped]:
        """The samples of one record, each read or dropped with a reason."""
        name = record.get("id")
        name = name if type(name) is str else str(name) if type(name) is int else None
        if len(self._responses) == 1 or "messages" in record or "input_ids" in record:
            return [self._read_one(record, 0, name, single=True)]
        return [self._read_one(record, k, name, single=False) for k in range(len(self._responses))]

    def _read_one(self, record: Mapping[str, Any], k: int, name: str | None, *, single: bool) -> Sample | Dropped:
        number = None if single else k
        try:
            return self._sample(record, k, name, number)
        except Dropped as error:
            dropped = error
        except MissingField as error:
            dropped = Dropped("missing field", str(error.args[0]))
        except RecursionError:
            dropped = Dropped(*NESTED)
        dropped.id, dropped.number = name, number
        return dropped.with_traceback(None)  # a traceback would keep the entire block in memory

    def _sample(self, record: Mapping[str, Any], k: int, name: str | None, number: int | None) -> Sample:
        source = self._source(record, k, number)
        if self.keep is not None:
            self._apply_keep(record)
        sample = Sample(name, number, source, self._score(record, k, source))
        if "input_ids" in record:
            sample.tokens, sample.mask = _tokenized(record)
            return sample
        sample.conversation = _chat(record) if "messages" in record else self._pair(record, k)
        return sample

    def _source(self, record: Mapping[str, Any], k: int, number: int | None) -> str | None:
        if self.format.source_field is not None:
            return str(lookup(record, self.format.source_field))
        return None if number is None else self.format.response_fields[k].split(".", 1)[0]

    def _apply_keep(self, record: Mapping[str, Any]) -> None:
        assert self.keep is not None
        try:
            kept = self.keep(record)
        except _EVALUATION_ERRORS as error:
            raise Dropped("keep cannot be evaluated", f"{self._keep_text}: {error}") from None
        if not kept:
            raise Dropped("not to keep", f"{self._keep_text} is false")

    def _score(self, record: Mapping[str, Any], k: int, source: str | None) -> float | None:
        evaluate: Evaluate | None = self._source_scores.get(source) if source is not None else None
        if evaluate is None:
            if not self._scores:
                return None
            evaluate = self._scores[k if len(self._scores) > 1 else 0]
        try:
            value = evaluate(record)
        except _EVALUATION_ERRORS as error:
            raise Dropped("score is not a number", str(error)) from None
        if not isinstance(value, bool | int | float):
            raise Dropped("score is not a number", f"found {value!r:.80}")
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise Dropped("score is not a number", f"found {value!r:.80}")
        if self.min_score is not None and score < self.min_score:
            raise Dropped("score too low", f"{score:g} < {self.min_score:g}")
        return score

    def _pair(self, record: Mapping[str, Any], k: int) -> Conversation:
        response_field, reasoning_field = self._responses[k]
        prompt, response = _text(record, self.format.prompt_field), _text(record, response_field)
        if not prompt or prompt.isspace():
            raise Dropped("empty prompt", f"field {self.format.prompt_field}")
        if not response or response.isspace():
            raise Dropped("empty response")
        shape: tuple[str, ...] = ("user", "assistant")
        texts = [prompt, response]
        if reasoning_field is not None:
            shape, texts = (*shape, "content"), [prompt, _text(record, reasoning_field), response]
        if self.format.system_field is not None:
            shape, texts = ("system", *shape), [_text(record, self.format.system_field), *texts]
        return Conversation(shape, texts)


def _text(record: Mapping[str, Any], path: str) -> str:
    value = record.get(path)
    if type(value) is str:
        return value
    value = lookup(record, path)
    if type(value) is not str:
        raise Dropped("field is not text", f"{path} is {type(value).__name__}")
    return value


def _chat(record: Mapping[str, Any]) -> Conversation:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise Dropped("messages is not a list")
    shape: list[str] = []
    texts: list[str] = []
    text_only = not record.get("tools")
    for i, message in enumerate(messages):
        role, reasoning, content = _message(i, message)
        shape.append(role)
        if reasoning is not None:
            shape.append("content")
            texts.append(reasoning)
        texts.append(content or "")
        text_only = text_only and content is not None and not any(message.get(name) for name in _NON_TEXT_KEYS)
    if text_only:
        return Conversation(tuple(shape), texts)
    full = [{**m, "content": text} for m, text in zip(messages, _contents(shape, texts), strict=True)]
    return Conversation(tuple(shape), texts, full, record.get("tools") or None)


def _contents(shape: list[str], texts: list[str]) -> list[str]:
    """Those of `texts` that are the content of a message, not its reasoning."""
    return [text for k, text in enumerate(texts) if shape[k + 1 : k + 2] != ["content"]]


def _message(i: int, message: Any) -> tuple[str, str | None, str | None]:
    """(role, reasoning, content) of message i; content is None if the message has only tool calls."""
    role = message.get("role") if isinstance(message, Mapping) else type(message).__name__
    if not isinstance(message, Mapping) or type(role) is not str or role not in _ROLES:
        raise Dropped("message without a known role", f"message {i}: {role!r:.60}")
    content, reasoning = message.get("content"), None
    if isinstance(content, list):
        content = _joined_parts(i, content)
    if type(content) is not str and not (content is None and message.get("tool_calls")):
        raise Dropped("message without text", f"message {i}: content is {type(content).__name__}")
    if role == "assistant":
        reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
        if reasoning is not None and type(reasoning) is not str:
            raise Dropped("reasoning is not text", f"message {i}: it is {type(reasoning).__name__}")
        if not (reasoning or (content and not content.isspace()) or message.get("tool_calls")):
            raise Dropped("empty response")
    return role, reasoning, content


def _joined_parts(i: int, parts: list[Any]) -> str:
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type", "text") == "text" else None for p in parts]
    if not all(type(text) is str for text in texts):
        raise Dropped("message without text", f"message {i}: content has parts that are not text")
    return "".join(text for text in texts if text is not None)


def _tokenized(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = record["input_ids"], record.get("loss_mask")
    if not _is_list_of_int(ids):
        raise Dropped("input_ids is not a list of integers")
    if mask is None or not _is_list_of_int(mask) or not set(mask) <= {0, 1}:
        raise Dropped("loss_mask is not a list of zeros and ones")
    if len(ids) != len(mask):
        raise Dropped("input_ids and loss_mask differ in length", f"{len(ids)} and {len(mask)}")
    if ids and not -1 < min(ids) <= max(ids) < 2**31:
        raise Dropped("token outside the vocabulary", f"ids go from {min(ids)} to {max(ids)}")
    return np.asarray(ids, np.int32), np.asarray(mask, np.uint8)


def _is_list_of_int(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)
