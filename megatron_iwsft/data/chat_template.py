"""Chat templates: render a conversation into pieces of text, each either trained on or not.

The loss mask follows from positions in the rendered text: an assistant turn starts where the template's generation prompt
ends (exactly what the model sees when it has to answer) and ends after its end-of-turn token.

Reasoning (`reasoning_content` of an assistant message) is rendered by the template if it supports that; otherwise it is put
between thinking tags before the content.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox

from megatron_iwsft.data.template_tracing import TracedFrame, Untraceable, trace, traceable
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.limits import TimeLimit, limits

Messages = Sequence[Mapping[str, Any]]

# Private-use code point that marks where an assistant's content starts in templates without a generation prompt.
_MARK = "\ue000"

# Conversation shapes whose traced frames are cached. Conversations of further shapes are rendered by Jinja.
_MAX_FRAMES = 4096

# A template is a program that came with a tokenizer, and renders whatever a record contains. These are limits for one conversation.
_SECONDS, _EXTRA_BYTES = 30.0, 2 << 30
_MAX_BITS, _MAX_LENGTH = 4096, 1 << 26  # of numbers, and of repeated strings and lists

PRESETS = {
    # The format of Qwen and many others.
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # For tokenizers without chat tokens: needs only a beginning- and an end-of-text token.
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
        "{% elif m.role == 'assistant' %}Answer: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('the plain template knows the roles system, user and assistant') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    ),
}


@dataclass(slots=True)
class Conversation:
    """A conversation.

    shape          what each of `texts` is: the role of its turn, or "content". If a turn has reasoning, the text under its role
                   is the reasoning and the next text, under "content", is its content.
    texts          the texts, one per entry of `shape`
    full_messages  the original messages if they have more than role, content and reasoning (tool calls, names), else None
    tools          tool definitions for the template
    """

    shape: tuple[str, ...]
    texts: list[str]
    full_messages: Messages | None = None
    tools: Any = None

    @property
    def messages(self) -> Messages:
        return self.full_messages if self.full_messages is not None else _messages(self.shape, self.texts)


def _messages(shape: Sequence[str], texts: Sequence[str]) -> Messages:
    out: list[dict[str, str]] = []
    for role, text in zip(shape, texts, strict=True):
        if role == "content":
            out[-1] |= {"reasoning_content": out[-1]["content"], "content": text}
        else:
            out.append({"role": role, "content": text})
    return out


class TemplateError(ValueError):
    """The template cannot render this conversation. The record is dropped with this `reason`."""

    def __init__(self, detail: str, reason: str = "template cannot render it") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered and which turns are trained on.

    roles     roles whose turns are trained on: assistant, user or both; never system, developer or tool
    turns     train on all turns of these roles, or only on the last
    thinking  tags before and after an assistant's reasoning, for templates that do not render reasoning themselves
    """

    roles: tuple[str, ...] = ("assistant",)
    turns: Literal["all", "last"] = "all"
    thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")

    def __post_init__(self) -> None:
        if not self.roles or not set(self.roles) <= {"assistant", "user"}:
            raise DataError(
                f"cannot train on turns of the roles {', '.join(self.roles) or '(none)'}: --train-role takes assistant and user."
            )


class ChatTemplate:
    """A Jinja chat template bound to a tokenizer.

    `name` selects one of PRESETS instead of the tokenizer's own template. Raises DataError if the tokenizer has no template and
    no name is given, if the name is unknown, or if the template is not valid Jinja or does not end an assistant turn with an
    end-of-turn token (the model would never learn to stop).
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None, rendering: Rendering = Rendering()) -> None:
        source = PRESETS.get(name) if name else tokenizer.chat_template
        if source is None and name:
            raise DataError(f"there is no template {name!r}; choose one of: {', '.join(PRESETS)}.")
        if source is None:
            raise DataError(
                f"the tokenizer has no chat template. Choose one with --template ({', '.join(PRESETS)}), or add "
                f"{CHAT_TEMPLATE} to the tokenizer's directory."
            )
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self.source, self.rendering = source, rendering
        self._tokenizer = tokenizer
        environment = _environment()
        try:
            with limits(seconds=_SECONDS, extra_bytes=_EXTRA_BYTES):
                self._template = environment.from_string(source)
                self._traceable = traceable(environment, source)
        except Exception as error:  # Python's compiler raises many kinds: RecursionError, MemoryError, SyntaxError …
            raise DataError(f"the chat template is not valid Jinja: {_one_line(error)}") from None
        self._variables = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._frames: dict[tuple[str, ...], TracedFrame | None] = {}
        self._check_end_of_turn()
        self.renders_reasoning = self._probe_reasoning()

    def _check_end_of_turn(self) -> None:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            with _limited():
                rendered = self.render(probe)
        except TemplateError as error:
            raise DataError(f"the chat template cannot render a question and an answer: {error}") from None
        if self._tokenizer.ends_with_special(rendered) is None:
            raise DataError(
                "the template does not end an assistant turn with a special token of this tokenizer, so the model would "
                f"never learn to stop. It renders {rendered!r}; the special tokens are "
                f"{', '.join(sorted(self._tokenizer.special)) or 'none'}. Choose another template with --template."
            )

    def _probe_reasoning(self) -> bool:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "\ue003"}]
        try:
            with _limited():
                return "\ue003" in self.render(probe)
        except TemplateError:
            return False

    def render(self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises TemplateError with the template's own message, whatever the template raises."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self._variables
            )
        except (Untraceable, TimeLimit):
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the template raised an error: {_one_line(error)}") from None
        except Exception as error:
            raise TemplateError(f"the template failed: {_one_line(error)}") from None

    def pieces(self, conversation: Conversation) -> tuple[list[str], TracedFrame | None, tuple[bool, ...]]:
        """(texts, frame, trained): the pieces, which concatenate to the rendered conversation; the traced frame they were rendered
        by, or None if by Jinja; and for each piece whether it is trained on.

        Raises TemplateError if no turn of the conversation is trained on, if the template rewrites earlier turns, so that
        the text before an answer is not what the model would see when it generates that answer, or if rendering takes too long.
        """
        if conversation.full_messages is None and self._traceable:
            frame = self._frame_of(conversation.shape)
            filled = frame.fill(conversation.texts) if frame is not None else None
            if frame is not None and filled is not None:
                return filled, frame, frame.trained
        with _limited():
            pieces = self.render_pieces(conversation.messages, conversation.tools)
        return [text for text, _ in pieces], None, tuple(trained for _, trained in pieces)

    def _frame_of(self, shape: tuple[str, ...]) -> TracedFrame | None:
        if shape in self._frames:
            return self._frames[shape]
        if len(self._frames) == _MAX_FRAMES:
            return None
        with _limited():
            frame = trace(len(shape), lambda probes: self.render_pieces(_messages(shape, probes)))
        self._frames[shape] = frame
        return frame

    def render_pieces(self, messages: Messages, tools: Any = None) -> list[tuple[str, bool]]:
        """`pieces`, always rendered by Jinja: [(text, trained)] whose texts concatenate to `render(messages)`."""
        if not self.renders_reasoning:
            messages = [self._inline_reasoning(m) for m in messages]
        full = self.render(messages, tools=tools)
        chosen = [i for i, m in enumerate(messages) if m.get("role") in self.rendering.roles]
        if not chosen:
            raise TemplateError(f"there is no turn of {' or '.join(self.rendering.roles)}", "no turn to train on")
        out: list[tuple[str, bool]] = []
        at = 0
        for i in chosen if self.rendering.turns == "all" else chosen[-1:]:
            start, end = self._turn(messages, i, tools)
            if start < at or not full.startswith(self.render(messages[: i + 1], tools=tools)[:end]):
                raise TemplateError(f"the template rewrites turn {i} when later turns follow")
            out += [(full[at:start], False), (full[start:end], True)]
            at = end
        out.append((full[at:], False))
        return [(text, trained) for text, trained in out if text]

    def _inline_reasoning(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        reasoning = message.get("reasoning_content")
        if reasoning is None:
            return message
        before, after = self.rendering.thinking
        rest = {k: v for k, v in message.items() if k != "reasoning_content"}
        return rest | {"content": before + reasoning + after + (message.get("content") or "")}

    def _turn(self, messages: Messages, i: int, tools: Any) -> tuple[int, int]:
        """Start and end of turn i in the rendering of the messages up to and including it."""
        through = self.render(messages[: i + 1], tools=tools)
        before = self.render(messages[:i], tools=tools) if i else ""
        assistant = messages[i]["role"] == "assistant"
        prompt = self.render(messages[:i], tools=tools, add_generation_prompt=True) if assistant and i else before
        if prompt == before:  # no generation prompt: the turn starts with its content
            start = self._content_start(messages, i, tools, through)
        elif through.startswith(prompt):
            start = len(prompt)
        else:
            raise TemplateError(f"the generation prompt differs from what the template renders before turn {i}")
        end = self._tokenizer.ends_with_special(through[start:])
        if end is None:
            raise TemplateError(f"turn {i} does not end with an end-of-turn token")
        return start, start + end

    def _content_start(self, messages: Messages, i: int, tools: Any, through: str) -> int:
        field = "reasoning_content" if messages[i].get("reasoning_content") is not None else "content"
        text = messages[i].get(field)
        if text is None:
            raise TemplateError(
                f"cannot find the start of turn {i}: it has no text, and the template has no generation prompt"
            )
        marked = self.render([*messages[:i], {**messages[i], field: _MARK + text}], tools=tools)
        start = marked.find(_MARK)
        if start < 0 or marked.replace(_MARK, "", 1) != through:
            raise TemplateError(f"the template changes the content of turn {i}")
        return start


@contextmanager
def _limited() -> Iterator[None]:
    """Raise TemplateError if rendering one conversation takes too long or too much memory."""
    try:
        with limits(seconds=_SECONDS, extra_bytes=_EXTRA_BYTES):
            yield
    except TimeLimit:
        raise TemplateError(f"the template took longer than {_SECONDS:g} seconds") from None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, jinja2.TemplateError):
        return lines[0] if lines else "no message"
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Arithmetic on large numbers and repetition run in C, where no time limit reaches them: their operands are bounded."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise OverflowError(f"a number of more than {_MAX_BITS} bits")
        if operator == "**" and not (isinstance(right, float) or abs(right) <= 64):
            raise OverflowError("an exponent above 64")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(value, "__len__") and len(value) * times > _MAX_LENGTH:
                    raise OverflowError(f"a text or list of more than {_MAX_LENGTH} items")
        return super().call_binop(context, operator, left, right)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    """Jinja's filter, which computes 10 ** precision, for a precision that a number can have."""
    if not -400 <= precision <= 400:
        raise OverflowError(f"round to {precision:.0e} digits")
    return jinja2.filters.do_round(value, precision, method)


def _environment() -> jinja2.Environment:
    """The Jinja environment that `transformers` uses for chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = tojson
    environment.filters["round"] = _round
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return environment
