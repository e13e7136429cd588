"""Conversations, and the forms of their messages that mean the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Messages = Sequence[Mapping[str, Any]]

# Per message of a conversation: whether it is trained on; None where the record does not say.
TrainFlags = tuple[bool | None, ...]


@dataclass(slots=True)
class Conversation:
    """A conversation.

    shape          what each of `texts` is: the role of its turn, or "content". If a turn has reasoning, the text under its role
                   is the reasoning and the next text, under "content", is its content.
    texts          the texts, one per entry of `shape`
    full_messages  the original messages if they have more than role, content and reasoning (tool calls, names), else None
    tools          tool definitions for the template
    weights        per message how much its turn is trained on, as the record says: 0 is not at all; None where it says nothing
    options        further variables for the template (`chat_template_kwargs`)
    earlier        message → its content with the reasoning inside, as the record has it and as the prompts of later turns show it;
                   for templates that render that differently from a content whose reasoning is separate
    """

    shape: tuple[str, ...]
    texts: list[str]
    full_messages: Messages | None = None
    tools: Any = None
    weights: tuple[float | None, ...] | None = None
    options: Mapping[str, Any] | None = None
    earlier: Mapping[int, str] | None = None

    @property
    def train(self) -> TrainFlags | None:
        """Per message whether it is trained on, as the record says."""
        return None if self.weights is None else tuple(None if w is None else w > 0 for w in self.weights)

    @property
    def messages(self) -> Messages:
        return self.full_messages if self.full_messages is not None else messages_of(self.shape, self.texts)


def messages_of(shape: Sequence[str], texts: Sequence[str]) -> Messages:
    """The messages of a conversation that has only texts, given as in `Conversation`."""
    out: list[dict[str, str]] = []
    for role, text in zip(shape, texts, strict=True):
        if role == "content":
            out[-1] |= {"reasoning_content": out[-1]["content"], "content": text}
        else:
            out.append({"role": role, "content": text})
    return out


def shape_of(messages: Messages) -> tuple[Any, ...]:
    """What a template could tell of the messages without looking at their texts."""
    keys = ("content", "reasoning_content", "tool_calls", "name")
    return tuple((m.get("role"), *(_kind(m.get(key)) for key in keys)) for m in messages)


def _kind(value: Any) -> Any:
    return len(value) if isinstance(value, list) else bool(value) if value is not None else None


def separate_reasoning(conversation: Conversation, opening: str, closing: str) -> Conversation:
    """The conversation with what stands between two tags at the beginning of an answer as the answer's reasoning."""
    messages = [_separated(m, opening, closing) for m in conversation.messages]
    shape: list[str] = []
    texts: list[str] = []
    for m in messages:
        reasoning, content = m.get("reasoning_content"), m.get("content") or ""
        shape += [m["role"]] if reasoning is None else [m["role"], "content"]
        texts += [content] if reasoning is None else [reasoning, content]
    full = None if conversation.full_messages is None else messages
    return replace(conversation, shape=tuple(shape), texts=texts, full_messages=full)


def _separated(message: Mapping[str, Any], opening: str, closing: str) -> Mapping[str, Any]:
    content = message.get("content")
    if message["role"] != "assistant" or message.get("reasoning_content") or not isinstance(content, str):
        return message
    before, tag, after = content.partition(closing)
    opened = before.lstrip().startswith(opening)
    if not tag or (opening in before and not opened):
        return message
    reasoning = before.lstrip().removeprefix(opening) if opened else before
    return {**message, "reasoning_content": reasoning.strip("\n"), "content": after.lstrip("\n")}


def equivalent_forms(messages: Messages) -> Iterator[Messages]:
    """The messages, with tool calls in each form that means the same to an API and of which a template may take only one.

    Arguments are objects or JSON texts, and an empty content beside a call is as the record has it, null or "".
    """
    if not any(m.get("tool_calls") for m in messages):
        yield messages
        return
    for empty in (_as_given, _as_null, _as_text):
        for form in (_as_object, _as_json):
            yield [_with_call_form(m, form, empty) for m in messages]


def _as_given(content: Any) -> Any:
    return content


def _as_null(content: Any) -> Any:
    return content or None


def _as_text(content: Any) -> Any:
    return content or ""


def _with_call_form(
    message: Mapping[str, Any], form: Callable[[Any], Any], empty: Callable[[Any], Any]
) -> Mapping[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    out = []
    for call in calls:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            function = call["function"]
            call = {**call, "function": {**function, "arguments": form(function.get("arguments"))}}
        elif isinstance(call, Mapping) and "arguments" in call:
            call = {**call, "arguments": form(call["arguments"])}
        out.append(call)
    return {**message, "tool_calls": out, "content": empty(message.get("content"))}


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = exact_json(arguments, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def exact_json(text: str, **hooks: Any) -> Any:
    """`json.loads`, but with a ValueError for a number that is too large to be one, such as 1e999, which would become Infinity."""
    return json.loads(text, parse_float=_finite, **hooks)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text:.30} is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _as_json(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict | list) else arguments
