"""Find what a conversation says that its rendering does not: a template may leave out, cut or change a text without an error."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any


def find_lost_text(
    messages: Sequence[Mapping[str, Any]], text: str, *, trained: Collection[int], tools: Any = None
) -> str | None:
    """The first thing that `messages` say and `text` does not, such as "the content of turn 2 (tool)"; None if nothing is missing.

    Looked for are the content of every turn, in order (but that of a system turn anywhere, since templates move it), tool calls with their
    arguments, the names of `tools`, and the reasoning of the turns in `trained`: templates drop that of earlier turns at inference too.
    Whitespace around a content and its escaping as JSON are not differences.
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
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            named = function if isinstance(function, Mapping) else {}
            for value in (named.get("name"), *_leaves(named.get("arguments"))):
                if value is not None and not any(_find(form, text) >= 0 for form in _forms(value)):
                    return f"a tool call of {turn}: {value!r:.60} is missing"
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            return f"the tool {name!r:.60}"
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
