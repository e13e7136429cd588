"""Read an input record as samples (a conversation or tokens, with a score), or drop it with a reason."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import orjson

from megatron_iwsft.data.chat_template import Rendering
from megatron_iwsft.data.conversation import Conversation, exact_json
from megatron_iwsft.data.prepare.expressions import Evaluate, MissingField, compile_expression, lookup, truth
from megatron_iwsft.data.prepare.messages import MEDIA, REASONING, Dropped, MessageReader, role_of
from megatron_iwsft.errors import DataError

_EVALUATION_ERRORS = (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError, MemoryError)
# What a record may say beside its texts or messages, apart from `system_field`.
_BESIDE = frozenset(("system", "tools", "functions", "chat_template_kwargs"))
# Fields in which corpora hold more of a conversation, or what is no text.
_PARTS = frozenset(
    (
        *REASONING,
        "input",
        "context",
        "history",
        "system_prompt",
        "documents",
        "images",
        "image",
        "audios",
        "audio",
        "videos",
        "video",
    )
)
_BOM = b"\xef\xbb\xbf"
_LONG_INTEGER = re.compile(rb"[:\[,]\s*-?\d{19}")  # orjson rounds integers of more than 64 bits to floats

_NESTED = frozenset((dict, list))
NESTED = "nested too deeply", "more levels than Python's recursion limit"


@dataclass(frozen=True)
class RecordFormat:
    """The fields of a record. Field names may be dotted paths into nested objects.

    A record with `messages` or `conversations` is a chat, one with `input_ids` is already tokenized, any other is a prompt with
    one response per entry of `response_fields` (several sampled solutions of one problem). A response field may also hold a list of
    texts, each a response; then the values of reasoning fields, of scores and of `keep` that are lists belong to the responses, one by one.
    The prompt and a response may be lists of messages (as in preference data); a response that begins with a user's turn is the
    entire conversation. `reasoning_fields` and `score_fields` are empty, or hold one entry for all responses or one per
    response. A score is a field or an expression over fields (`expressions.py`).

    layout         "auto" as above; "fields" reads prompt and responses also from records that have messages
    source_field   field that holds the record's source; by default the source is the first part of the response field's path
                   if there are several response fields, else the input file
    source_scores  (source, expression) pairs that replace `score_fields` for these sources
    answer_prefix  put before a response that does not contain it (compared without the spaces around it)
    strip          strip whitespace around responses and reasoning
    thought_tags   tags around an answer's reasoning and around its solution, which are removed: (open, close, open, close)
    ignored_keys   keys of messages that are not looked at
    plain_tokens   added tokens of the tokenizer that a content may contain, as ordinary text
    rendering      how conversations are rendered and which turns are trained on
    """

    prompt_field: str = "prompt"
    response_fields: tuple[str, ...] = ("response",)
    reasoning_fields: tuple[str, ...] = ()
    system_field: str | None = None
    score_fields: tuple[str, ...] = ()
    layout: Literal["auto", "fields"] = "auto"
    source_field: str | None = None
    source_scores: tuple[tuple[str, str], ...] = ()
    answer_prefix: str | None = None
    strip: bool = False
    thought_tags: tuple[str, str, str, str] | None = None
    ignored_keys: tuple[str, ...] = ()
    plain_tokens: tuple[str, ...] = ()
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


PRESETS = {
    # simplescaling/s1K-1.1, tokenized as in the s1 paper (arXiv 2501.19393): reasoning and attempt under separate headings.
    "s1k-1.1": RecordFormat(
        prompt_field="question",
        reasoning_fields=("deepseek_thinking_trajectory",),
        response_fields=("deepseek_attempt",),
        answer_prefix="Answer: ",
        strip=True,
        rendering=Rendering(thinking=("<|im_start|>think\n", "\n<|im_start|>answer\n")),
    ),
    # open-thoughts/OpenThoughts-114k
    "openthoughts": RecordFormat(
        thought_tags=(
            "<|begin_of_thought|>",
            "<|end_of_thought|>",
            "<|begin_of_solution|>",
            "<|end_of_solution|>",
        )
    ),
    # open-r1/OpenR1-Math-220k: several generations per problem, each with its verdict as score
    "openr1": RecordFormat(
        prompt_field="problem",
        response_fields=("generations",),
        score_fields=("correctness_math_verify",),
        layout="fields",
    ),
    # Preference data (prompt, chosen, rejected): the chosen answers
    "preference": RecordFormat(prompt_field="prompt", response_fields=("chosen",), layout="fields"),
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
    line = line.removeprefix(_BOM)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_with_json(line)
    if type(record) is not dict:
        raise Dropped("not a JSON object", f"found {type(record).__name__}")
    if type(record.get("id")) is float or not _NESTED.isdisjoint(map(type, record.values())):
        exact = b'"tool' in line or b'"function' in line or type(record.get("id")) is float
        if exact and _LONG_INTEGER.search(line):
            record = _parse_with_json(line)
    return record


def _parse_with_json(line: bytes) -> Any:
    """Parse with the standard library: it accepts more than orjson (NaN, very long integers) and has clearer error messages."""
    try:
        record = exact_json(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Dropped("not UTF-8", str(error)) from None
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise Dropped("not valid Unicode", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Dropped("not JSON", str(error)) from None
    return record


@dataclass(frozen=True)
class _Response:
    """Which response of a record: its field and the field of its reasoning, their number, and the entry if they hold lists."""

    field: str
    reasoning: str | None
    number: int
    entry: int | None = None
    entries: int = 0

    def of(self, value: Any) -> Any:
        """The part of a field's value that belongs to this response."""
        if self.entry is None or not isinstance(value, list):
            return value
        if len(value) != self.entries:
            raise Dropped("lists of different lengths", f"{self.entries} responses, and a list of {len(value)} values")
        return value[self.entry]


class RecordReader:
    """Reads records as samples. `keep` and `min_score` are as in `Curation`."""

    def __init__(self, record_format: RecordFormat, *, keep: str | None = None, min_score: float | None = None) -> None:
        self.format, self.min_score = record_format, min_score
        self.messages = MessageReader(record_format.ignored_keys)
        self.keep = compile_expression(keep) if keep else None
        self._keep_text = keep
        self._scores = [compile_expression(e) for e in record_format.score_fields]
        self._source_scores = {source: compile_expression(e) for source, e in record_format.source_scores}
        reasoning = record_format.reasoning_fields
        self._responses = [
            _Response(name, reasoning[k if len(reasoning) > 1 else 0] if reasoning else None, k)
            for k, name in enumerate(record_format.response_fields)
        ]
        self._thought = _thought_pattern(record_format.thought_tags)
        self._parts_beside_chat = _PARTS.union(record_format.response_fields)

    def read(self, record: Mapping[str, Any]) -> list[Sample | Dropped]:
        """The samples of one record, each read or dropped with a reason."""
        name = record.get("id")
        name = name if type(name) is str else str(name) if type(name) is int else None
        if type(record.get(self._responses[0].field)) is str and len(self._responses) == 1:
            return [self._read_one(record, self._responses[0], name, None)]
        responses = list(self._responses_of(record))
        if len(responses) == 1:
            return [self._read_one(record, responses[0], name, None)]
        return [self._read_one(record, response, name, k) for k, response in enumerate(responses)]

    def _responses_of(self, record: Mapping[str, Any]) -> Iterator[_Response]:
        if "input_ids" in record or self._is_chat(record):
            yield self._responses[0]
            return
        for response in self._responses:
            value = record.get(response.field)
            if value is None and "." in response.field:
                try:
                    value = lookup(record, response.field)
                except MissingField:
                    value = None
            if isinstance(value, list) and value and not isinstance(value[0], Mapping):
                yield from (replace(response, entry=i, entries=len(value)) for i in range(len(value)))
            else:
                yield response

    def _is_chat(self, record: Mapping[str, Any]) -> bool:
        return self.format.layout == "auto" and (
            record.get("messages") is not None or record.get("conversations") is not None
        )

    def _read_one(
        self, record: Mapping[str, Any], response: _Response, name: str | None, number: int | None
    ) -> Sample | Dropped:
        try:
            return self._sample(record, response, name, number)
        except Dropped as error:
            dropped = error
        except MissingField as error:
            dropped = Dropped("missing field", str(error.args[0]))
        except RecursionError:
            dropped = Dropped(*NESTED)
        dropped.id, dropped.number = name, number
        return dropped.with_traceback(None)  # a traceback would keep the entire block in memory

    def _sample(self, record: Mapping[str, Any], response: _Response, name: str | None, number: int | None) -> Sample:
        source = self._source(record, response)
        if self.keep is not None:
            self._apply_keep(record, response)
        sample = Sample(name, number, source, self._score(record, response, source))
        if "input_ids" in record:
            sample.tokens, sample.mask = _tokenized(record)
            return sample
        is_chat = self._is_chat(record)
        conversation = self._chat(record) if is_chat else self._pair(record, response)
        parts = self._parts_beside_chat if is_chat else _PARTS
        if not parts.isdisjoint(record):
            self._check_parts(record, conversation, parts)
        sample.conversation = self._with_thoughts(conversation) if self._thought is not None else conversation
        return sample

    def _check_parts(self, record: Mapping[str, Any], conversation: Conversation, parts: frozenset[str]) -> None:
        """Raise Dropped if the record has more of the conversation in a field, one of `parts`, that is not read."""
        for name in sorted(parts.intersection(record) - set(self.format.ignored_keys)):
            found = record[name]
            if name in MEDIA and found:
                raise Dropped("content is not text", f"field {name}; --ignore-key {name} reads over it")
            written = name in REASONING or name not in _PARTS  # by the assistant
            read = isinstance(found, str) and any(
                _has_part(text, found.strip())
                for kind, text in zip(conversation.shape, conversation.texts, strict=True)
                if (kind in ("assistant", "content")) == written
            )
            if isinstance(found, str | list | Mapping) and found and not read:
                raise Dropped(
                    "text in a field that is not read",
                    f"field {name} has text that is not in the conversation; put it there, name the field in an option, or read over it "
                    f"with --ignore-key {name}",
                )

    def _source(self, record: Mapping[str, Any], response: _Response) -> str | None:
        if self.format.source_field is not None:
            return str(lookup(record, self.format.source_field))
        several = len(self._responses) > 1 and not self._is_chat(record) and "input_ids" not in record
        return response.field.split(".", 1)[0] if several else None

    def _apply_keep(self, record: Mapping[str, Any], response: _Response) -> None:
        assert self.keep is not None
        try:
            kept = truth(response.of(self.keep(record)))
        except _EVALUATION_ERRORS as error:
            raise Dropped("keep cannot be evaluated", f"{self._keep_text}: {error}") from None
        if not kept:
            raise Dropped("not to keep", f"{self._keep_text} is false")

    def _score(self, record: Mapping[str, Any], response: _Response, source: str | None) -> float | None:
        evaluate: Evaluate | None = self._source_scores.get(source) if source is not None else None
        if evaluate is None:
            if not self._scores:
                return None
            evaluate = self._scores[response.number if len(self._scores) > 1 else 0]
        try:
            value = response.of(evaluate(record))
        except Dropped:
            raise
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

    def _chat(self, record: Mapping[str, Any]) -> Conversation:
        turns = record["conversations"] if record.get("messages") is None else record["messages"]
        other = record.get("conversations")
        if isinstance(turns, list) and isinstance(other, list) and other and _contents(other) != _contents(turns):
            raise Dropped("different values under keys that mean the same", "messages and conversations")
        return self._conversation(record, turns)

    def _pair(self, record: Mapping[str, Any], response: _Response) -> Conversation:
        """Prompt and response as a conversation. A response that begins with another role than the assistant is all of it."""
        answer = response.of(_value(record, response.field))
        if isinstance(answer, str):
            prompt = _value(record, self.format.prompt_field)
            if (
                isinstance(prompt, str)
                and not self.format.system_field
                and (_BESIDE.isdisjoint(record) or not any(map(record.get, _BESIDE)))
            ):
                return self._texts(prompt, answer, self._reasoning(record, response))  # most records of most corpora
            answer = [{"role": "assistant", "content": answer}]
        elif isinstance(answer, Mapping):
            answer = [answer]
        if not isinstance(answer, list) or not answer or not isinstance(answer[0], Mapping):
            raise Dropped("field is not text", f"{response.field} is {type(answer).__name__}")
        answer = [*answer[:-1], self._answer(answer[-1], self._reasoning(record, response))]
        if role_of(answer[0]) in ("assistant", "call"):
            answer = [*self._prompt(record), *answer]
        else:
            self._check_prompt(record, answer)
        return self._conversation(record, answer)

    def _texts(self, prompt: str, answer: str, reasoning: str | None) -> Conversation:
        self._check_filled(prompt)
        answer = self._prefixed(answer)
        if reasoning is None:
            return Conversation(("user", "assistant"), [prompt, answer])
        return Conversation(("user", "assistant", "content"), [prompt, reasoning, answer])

    def _prompt(self, record: Mapping[str, Any]) -> list[Any]:
        prompt = _value(record, self.format.prompt_field)
        if isinstance(prompt, list):
            return prompt
        self._check_filled(prompt)
        return [{"role": "user", "content": prompt}]

    def _check_filled(self, prompt: Any) -> None:
        if not isinstance(prompt, str):
            raise Dropped("field is not text", f"{self.format.prompt_field} is {type(prompt).__name__}")
        if not prompt or prompt.isspace():
            raise Dropped("empty prompt", f"field {self.format.prompt_field}")

    def _check_prompt(self, record: Mapping[str, Any], conversation: list[Any]) -> None:
        """Raise Dropped if the record has a prompt that is not in the conversation which its response is."""
        prompt = record.get(self.format.prompt_field)
        wanted = prompt if isinstance(prompt, list) else [{"content": prompt}]
        found = _contents(conversation)
        if not all(text in found for text in _contents(wanted) if text):
            raise Dropped("prompt is not in the conversation", f"field {self.format.prompt_field}")

    def _answer(self, message: Any, reasoning: str | None) -> Any:
        """The last message of a response, with `reasoning` and what the format says of prefix and whitespace."""
        if not isinstance(message, Mapping) or role_of(message) != "assistant":
            return message
        given = {name: text for name in REASONING if (text := message.get(name))}
        if reasoning is not None and any(text != reasoning for text in given.values()):
            raise Dropped("different values under keys that mean the same", "reasoning in the response and beside it")
        key = "content" if "content" in message else "value"
        content = message.get(key)
        if isinstance(content, str) and content and not content.isspace():
            message = {**message, key: self._prefixed(content)}
        if reasoning is not None:
            return {**message, "reasoning_content": reasoning}
        return {**message, **{k: self._stripped(text) for k, text in given.items() if isinstance(text, str)}}

    def _prefixed(self, answer: str) -> str:
        if not answer or answer.isspace():
            raise Dropped("empty response")
        prefix = self.format.answer_prefix
        return self._stripped(prefix + answer if prefix is not None and prefix.strip() not in answer else answer)

    def _reasoning(self, record: Mapping[str, Any], response: _Response) -> str | None:
        if response.reasoning is None:
            return None
        return self._stripped(_text(response.of(_value(record, response.reasoning)), response.reasoning))

    def _conversation(self, record: Mapping[str, Any], turns: Any) -> Conversation:
        """The turns with the record's system prompt, tools and template variables."""
        system = self._system(record)
        if system and isinstance(turns, list):
            first = turns[0] if turns and role_of(turns[0]) == "system" else None
            if first is None:
                turns = [{"role": "system", "content": system}, *turns]
            elif _content(first) != _content({"content": system}):
                raise Dropped("two system prompts", "one in the messages and a different one beside them")
        if _is_definitions(record.get("functions")):
            raise Dropped("tool definitions under functions", "put them under tools, as {type: function, function: …}")
        return self.messages.read(turns, tools=record.get("tools"), options=record.get("chat_template_kwargs"))

    def _system(self, record: Mapping[str, Any]) -> Any:
        name = self.format.system_field
        return record.get("system") if name is None else _text(_value(record, name), name)

    def _stripped(self, text: str) -> str:
        return text.strip() if self.format.strip else text

    def _with_thoughts(self, conversation: Conversation) -> Conversation:
        """The conversation with answers taken apart at `thought_tags`. Raises Dropped for an answer that has not all four."""
        assert self._thought is not None
        if conversation.full_messages is not None:
            raise Dropped("reasoning tags in a conversation with tool calls")
        shape: list[str] = []
        texts: list[str] = []
        for role, text in zip(conversation.shape, conversation.texts, strict=True):
            if role != "assistant":
                shape, texts = [*shape, role], [*texts, text]
                continue
            found = self._thought.fullmatch(text.strip())
            if found is None:
                raise Dropped("reasoning tags are incomplete", f"expected {' … '.join(self.format.thought_tags or ())}")
            shape, texts = [*shape, role, "content"], [*texts, found[1].strip(), found[2].strip()]
        return replace(conversation, shape=tuple(shape), texts=texts)


def _thought_pattern(tags: tuple[str, str, str, str] | None) -> re.Pattern[str] | None:
    return None if tags is None else re.compile(r"{}(.*?){}\s*{}(.*?){}".format(*map(re.escape, tags)), re.DOTALL)


def _contents(messages: list[Any]) -> list[Any]:
    return [_content(message) for message in messages if isinstance(message, Mapping)]


def _content(message: Mapping[str, Any]) -> Any:
    content = message.get("content", message.get("value"))
    return content.strip() if isinstance(content, str) else content


def _has_part(text: str, part: str) -> bool:
    """Whether `part` is in `text`, and not only within a word or a number of it."""
    at = text.find(part)
    while at >= 0:
        around = (text[at - 1 : at] + part[:1], part[-1:] + text[at + len(part) :][:1])
        if not any(len(pair) == 2 and pair.isascii() and pair.isalnum() for pair in around):
            return True
        at = text.find(part, at + 1)
    return False


def _is_definitions(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) and "name" in entry for entry in value)


def _value(record: Mapping[str, Any], path: str) -> Any:
    value = record.get(path)
    return lookup(record, path) if value is None else value


def _text(value: Any, path: str) -> str:
    if type(value) is not str:
        raise Dropped("field is not text", f"{path} is {type(value).__name__}")
    return value


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
