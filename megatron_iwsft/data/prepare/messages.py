"""Read the messages of a chat record, in the layouts that public corpora use, as a `Conversation`.

Understood are OpenAI's messages (`role`, `content`, `tool_calls`) and ShareGPT's (`from`, `value`), and the flags that TRL, axolotl,
ms-swift and LLaMA-Factory put on a message to say whether, and how much, it is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_iwsft.data.conversation import Conversation, exact_json

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # an assistant's turn whose text is a tool call as JSON
}
# Names of an assistant's reasoning in public corpora.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that templates render beside the text.
_BESIDE = ("tool_call_id", "name")
_RENDERED = ("tool_calls", *_BESIDE)
_TEXT = ("role", "from", "content", "value", *REASONING, *_RENDERED, "function_call")
# Keys under which some corpora and APIs hold text that no template is given.
_UNREAD = ("functions", "tools", "reasoning_details", "thinking_blocks", "tool_plan", "thought", "thoughts")
# Content that is not text.
MEDIA = ("images", "image", "audio", "audios", "videos", "video", "files", "documents", "refusal")
# Variables of templates that are not options.
_OWN_VARIABLES = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
FLAGS = ("loss", "loss_mask", "trainable", "train")
WEIGHT = "weight"
_LEAST, _MOST = 1e-6, 1e6  # of a weight that is not 0: some way below and above, float32 has no value for it
_CHANGES_TRAINING = re.compile("loss|mask|train|weight|label|ignore|grad", re.IGNORECASE)
# Keys whose value may be a number without being a flag or a weight.
_COUNTS = (
    "id", "idx", "index", "message_id", "parent_id", "turn", "turn_id", "step", "time", "timestamp", "created", "created_at", "create_time",
    "updated_at", "length", "tokens", "num_tokens", "token_count",
)  # fmt: skip


class Dropped(ValueError):
    """A record that is dropped. `reason` is a short phrase that is counted; `detail` is specific to this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail
        self.id: str | None = None  # as in Sample
        self.number: int | None = None


class UnreadableKeys(Exception):
    """Keys of messages that may change what is trained on and are not understood. `places`: key → where it was found first."""

    def __init__(self, places: Mapping[str, str]) -> None:
        super().__init__(places)
        self.places = dict(places)


class MessageReader:
    """Reads lists of messages. Keys in `ignored` are not looked at.

    unused      keys that were found on messages and are not used, such as a timestamp
    unreadable  keys that were found on messages, may change what is trained on, and are not understood: see `UnreadableKeys`
    """

    def __init__(self, ignored: Collection[str] = ()) -> None:
        self._ignored = frozenset(ignored)
        self.unused: set[str] = set()
        self.unreadable: set[str] = set()

    def read(self, messages: Any, *, tools: Any = None, options: Any = None) -> Conversation:
        """The conversation. Raises Dropped for messages that cannot be read."""
        messages, tools = _from_json(messages), _tools(tools)
        if not isinstance(messages, list) or not messages:
            raise Dropped("messages is not a list", f"found {messages!r:.60}")
        shape: list[str] = []
        texts: list[str] = []
        full: list[dict[str, Any]] = []
        weights: list[float | None] = []
        text_only = not tools
        for i, message in enumerate(messages):
            read = self._message(i, message)
            weights.append(_weight(i, message, read["role"]))
            reasoning, content = read.get("reasoning_content"), read.get("content")
            shape += [read["role"]] if reasoning is None else [read["role"], "content"]
            texts += [content or ""] if reasoning is None else [reasoning, content or ""]
            text_only = text_only and content is not None and not any(read.get(name) for name in _RENDERED)
            full.append(read)
        if options is not None and not isinstance(options, Mapping):
            raise Dropped("chat_template_kwargs is not an object", f"it is {type(options).__name__}")
        if own := sorted(_OWN_VARIABLES.intersection(options or ())):
            raise Dropped("chat_template_kwargs has messages or tools", f"it has {own[0]}, which belongs beside it")
        return Conversation(
            tuple(shape),
            texts,
            None if text_only else full,
            tools,
            None if weights.count(None) == len(weights) else tuple(weights),
            options or None,
        )

    def _message(self, i: int, message: Any) -> dict[str, Any]:
        """Message i with the keys role, content, reasoning_content, tool_calls, tool_call_id and name, as far as it has them.

        `content` is None only where the record has none and there are tool calls.
        """
        role = role_of(message)
        if role is None:
            given = _given_role(message) if isinstance(message, Mapping) else type(message).__name__
            raise Dropped("message without a known role", f"message {i}: {given!r:.60}")
        if len(message) > 2:
            self._check_keys(i, message)
        content = _only(i, message, ("content", "value"))
        if isinstance(content, list):
            content = _joined_parts(i, content)
        given_calls = _only(i, message, ("tool_calls", "function_call"))
        if role == "call":
            _only(i, {"the text": content, "tool_calls": given_calls}, ("the text", "tool_calls"))
            role, content, given_calls = "assistant", None, content or "null"
        calls = _calls(i, given_calls)
        if type(content) is not str and not (content is None and calls):
            raise Dropped("message without text", f"message {i}: content is {type(content).__name__}")
        out: dict[str, Any] = {"role": role, "content": content}
        reasoning = _only(i, message, REASONING) or None
        if reasoning is not None and role != "assistant":
            raise Dropped("reasoning of another role", f"message {i} of the role {role} has reasoning")
        if role == "assistant":
            if reasoning is not None and type(reasoning) is not str:
                raise Dropped("reasoning is not text", f"message {i}: it is {type(reasoning).__name__}")
            if not (reasoning or (content and not content.isspace()) or calls):
                raise Dropped("empty response")
            out |= {"reasoning_content": reasoning} if reasoning is not None else {}
        out |= {name: message[name] for name in _BESIDE if message.get(name) and name not in self._ignored}
        return out | ({"tool_calls": calls} if calls else {})

    def _check_keys(self, i: int, message: Mapping[str, Any]) -> None:
        for key, value in message.items():
            if key in _TEXT or key in FLAGS or key == WEIGHT or value is None or key in self._ignored:
                continue
            if key in MEDIA:
                if value:
                    raise Dropped("content is not text", f"message {i} has {key}")
            elif key in _UNREAD:
                if value:
                    raise Dropped(
                        "text under a key that is not read",
                        f"message {i} has {key}: tool definitions belong under the record's tools, reasoning under "
                        f"reasoning_content; --ignore-key {key} reads over it",
                    )
            elif _CHANGES_TRAINING.search(key) or (isinstance(value, bool | int | float) and key not in _COUNTS):
                self.unreadable.add(key)
            else:
                self.unused.add(key)


def _weight(i: int, message: Mapping[str, Any], role: str) -> float | None:
    """How much message i is trained on, from its flags: 0 is not at all. None if it has no flag. Several flags multiply."""
    out = None
    for name in (*FLAGS, WEIGHT):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not (value == 0 or _LEAST <= value <= _MOST):
            raise Dropped(
                "training flag is not a number",
                f"message {i}: {name} is {value!r:.60}, expected true, false or a weight: 0, or {_LEAST:g} to {_MOST:g}",
            )
        if name != WEIGHT and value not in (0, 1):
            raise Dropped(
                "training flag is not a number", f"message {i}: {name} is {value!r:.60}, expected true or false"
            )
        out = float(value) if out is None else out * float(value)
    if out and role not in ("assistant", "user"):
        raise Dropped("trained turn of another role", f"message {i} of the role {role} is marked to be trained on")
    return out


def _tools(tools: Any) -> Any:
    """Tool definitions as objects: many corpora hold them, or each of them, as JSON text."""
    tools = _from_json(tools)
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise Dropped("tools is not a list", f"expected a list of objects, found {tools!r:.60}")
    return tools or None


def role_of(message: Any) -> str | None:
    """The role of a message by our name, "call" for an assistant's turn whose text is a tool call; None if it is unknown."""
    given = _given_role(message) if isinstance(message, Mapping) else None
    return _ROLES.get(given) if type(given) is str else None


def _given_role(message: Mapping[str, Any]) -> Any:
    return message.get("from") if message.get("role") is None else message["role"]


def _from_json(value: Any) -> Any:
    """What a JSON text holds, None if it is empty; any other value, and a text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return exact_json(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _only(i: int, message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value under one of `keys`, of which several may not hold different ones; the first that is not None if all are empty."""
    given = [value for key in keys if (value := message.get(key)) is not None]
    filled = [value for value in given if value]
    if len(filled) > 1 and any(value != filled[0] for value in filled):
        names = " and ".join(key for key in keys if message.get(key))
        raise Dropped("different values under keys that mean the same", f"message {i} has {names}")
    return (filled or given or [None])[0]


def _calls(i: int, given: Any) -> list[Mapping[str, Any]] | None:
    """Tool calls as a list: from such a list, or from a call, or several, as `function_call` or a JSON text holds them."""
    calls = _from_json(given)
    if not calls:
        return None
    if isinstance(calls, str):
        raise Dropped("tool call is not JSON", f"message {i}: {given!r:.60}")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) for call in calls):
        raise Dropped("tool_calls is not a list of objects", f"message {i}: it is {given!r:.60}")
    for call in calls:
        function = call.get("function", call)
        if not (isinstance(function, Mapping) and type(function.get("name")) is str and function["name"]):
            raise Dropped("tool call without a name", f"message {i}: {call!r:.60}")
    if isinstance(given, list):
        return calls
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _joined_parts(i: int, parts: list[Any]) -> str:
    out = ""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if kind == "text" else None
        if kind == "text" and (found := next((key for key in MEDIA if part.get(key)), None)):
            raise Dropped("content is not text", f"message {i}: content has parts with {found}")
        if type(text) is not str:
            raise Dropped(
                "message without text",
                f"message {i}: content has a part of type {kind!r:.60}; reasoning belongs under reasoning_content, a call under tool_calls",
            )
        if flag := next((key for key in part if _CHANGES_TRAINING.search(key) and part[key] is not None), None):
            raise Dropped(
                "training flag on a part of a message",
                f"message {i}: a part of its content has {flag}, and a message is trained on or not as one: put it on the message, or "
                "make the part a message of its own",
            )
        out += text
    return out
