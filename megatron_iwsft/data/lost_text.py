"""Find what a conversation says that its rendering does not: a template may leave out, cut or change a text without an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

_IDS = ("id", "type", "index")  # of a tool call: templates need not show them


def find_lost_text(
    messages: Sequence[Mapping[str, Any]],
    text: str,
    *,
    trained: Collection[int],
    tools: Any = None,
    options: Mapping[str, Any] | None = None,
    originals: Mapping[Any, Any] | None = None,
) -> str | None:
    """The first thing that `messages` say and `text` does not, such as "the content of turn 2 (tool)"; None if nothing is missing.

    Looked for are the content of every turn, in order (but that of a system turn anywhere, since templates move it), the names on
    messages, tool calls with their arguments, the reasoning of the turns in `trained` (templates drop that of earlier turns at inference
    too), of `tools` the names and descriptions of the tools and their parameters, and what is in lists and objects of `options`.
    Whitespace around a content and its escaping as JSON are not differences. `originals` are those of `marked`.
    """
    at = 0
    for i, message in enumerate(messages):
        turn = f"turn {i} ({message.get('role')})"
        reasoning = message.get("reasoning_content")
        if i in trained and isinstance(reasoning, str) and _find(reasoning, text) < 0:
            return f"the reasoning of {turn}"
        content = message.get("content")
        if isinstance(content, str):
            moves = message.get("role") in ("system", "developer")
            found = _find(content, text, 0 if moves else at)
            if found < 0:
                return f"the content of {turn}"
            at = at if moves else found
        name = message.get("name")  # a tool's is that of its call, which may be marked
        if name and not (originals and message.get("role") == "tool") and _find(str(name), text) < 0:
            return f"the name on {turn}"
        for call in message.get("tool_calls") or ():
            missing = _missing(_call_parts(call), text, originals)
            if missing is not None:
                return f"a tool call of {turn}: {missing} is missing"
    for tool in tools if isinstance(tools, list) else ():
        missing = _missing(_definition_parts(tool), text, originals)
        if missing is not None:
            return f"the definition of a tool: {missing} is missing"
    for name, value in (options or {}).items():
        missing = _missing(_leaves(value), text, None) if isinstance(value, Mapping | list) else None
        if missing is not None:
            return f"the template variable {name}: {missing} is missing"
    return None


def marked(messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[Mapping[str, Any]], Any, dict[Any, Any]]:
    """Messages and tools with texts that occur nowhere else, so that each can only be found where it is rendered; what they stand for.

    A short text may also be found in another turn, a `true` in any, and the names of a tool's definition in its calls.
    """
    marks = _Marks()
    return (*_changed(messages, tools, marks), marks.originals)


def fence(text: str) -> str:
    """A text with a private-use code point at both ends, so that it joins nothing around it."""
    return f"\ue013{text}\ue013"


def fenced(messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[Mapping[str, Any]], Any]:
    """Messages and tools with a `fence` around each text."""
    return _changed(messages, tools, _Fences())


def _changed(messages: Sequence[Mapping[str, Any]], tools: Any, marks: _Marks) -> tuple[list[Mapping[str, Any]], Any]:
    out: list[Mapping[str, Any]] = []
    for message in messages:
        new: dict[str, Any] = {
            key: marks.of(message[key]) for key in ("content", "reasoning_content") if message.get(key)
        }
        if isinstance(message.get("name"), str) and message.get("role") != "tool":
            new["name"] = marks.of(message["name"])
        calls = message.get("tool_calls")
        new |= {"tool_calls": [_in_function(call, marks.call) for call in calls]} if isinstance(calls, list) else {}
        out.append({**message, **new})
    return out, [_in_function(t, marks.definition) for t in tools] if isinstance(tools, list) else tools


def _in_function(value: Any, change: Callable[[Mapping[str, Any]], Any]) -> Any:
    """A tool call or definition with what is under `function`, or with itself if it has none, changed."""
    if not isinstance(value, Mapping):
        return value
    inner = value.get("function", value)
    if not isinstance(inner, Mapping):
        return value
    return {**value, "function": change(inner)} if "function" in value else change(value)


class _Marks:
    """Texts of private-use code points, numbered, and what each of them stands for."""

    def __init__(self) -> None:
        self.originals: dict[Any, Any] = {}

    def of(self, value: Any) -> Any:
        mark = f"\ue010{len(self.originals)}\ue012"
        self.originals[mark] = value
        return mark

    def call(self, function: Mapping[str, Any]) -> Mapping[str, Any]:
        new: dict[str, Any] = {"name": self.of(function["name"])} if function.get("name") else {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            new["arguments"] = self._json(arguments)
        elif arguments is not None:
            new["arguments"] = self._inside(arguments)
        return {**function, **new}

    def definition(self, function: Mapping[str, Any]) -> Mapping[str, Any]:
        new: dict[str, Any] = {key: self.of(function[key]) for key in ("name", "description") if function.get(key)}
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(parameters, Mapping) and isinstance(properties, Mapping):
            names = {name: self.of(name) for name in properties}
            marked = {names[name]: self._described(value) for name, value in properties.items()}
            changed = {**parameters, "properties": marked}
            if isinstance(parameters.get("required"), list):
                changed["required"] = [names.get(name, name) for name in parameters["required"] if type(name) is str]
            new["parameters"] = changed
        return {**function, **new}

    def _described(self, value: Any) -> Any:
        if not (isinstance(value, Mapping) and value.get("description")):
            return value
        return {**value, "description": self.of(value["description"])}

    def _json(self, text: str) -> str:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return self.of(text)
        mark = json.dumps(self._inside(found), ensure_ascii=False)
        self.originals[mark] = text
        return mark

    def _inside(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {self.of(key): self._inside(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._inside(inner) for inner in value]
        return value if value is None or value == "" else self.of(value)


class _Fences(_Marks):
    """The texts themselves, with a fence around each."""

    def of(self, value: Any) -> Any:
        return fence(value) if isinstance(value, str) else value


def _call_parts(call: Mapping[str, Any]) -> Iterator[Any]:
    function = call.get("function", call)
    if isinstance(function, Mapping):
        yield from _leaves([value for key, value in function.items() if key not in _IDS])


def _definition_parts(tool: Any) -> Iterator[Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping):
        yield function.get("name")
        yield function.get("description")
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        for name, value in properties.items() if isinstance(properties, Mapping) else ():
            yield name
            yield value.get("description") if isinstance(value, Mapping) else None


def _missing(parts: Iterable[Any], text: str, originals: Mapping[Any, Any] | None) -> str | None:
    for part in parts:
        if part is not None and not any(_find(form, text) >= 0 for form in _forms(part)):
            return f"{(originals or {}).get(part, part)!r:.60}"
    return None


def _find(part: str, text: str, start: int = 0) -> int:
    """Where `part` ends in `text` at or after `start`; −1 if it is not there."""
    part = part.strip()
    for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]):
        found = text.find(form, start)
        if found >= 0:
            return found + len(form)
    return -1


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else (str(value), json.dumps(value, default=str))
