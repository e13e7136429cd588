"""Chat templates: a conversation → pieces of text, each either trained on or not.

What is trained on is decided by position while rendering: an assistant turn starts where the template's generation prompt
ends (exactly what the model will see when it has to answer) and ends after its end-of-turn token.

Reasoning (`reasoning_content` of an assistant message) is rendered by the template where it knows how to, otherwise put before
the content between thinking tags.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.sandbox

from megatron_iwsft.data.template_tracing import Plan, trace, traceable
from megatron_iwsft.data.tokenizer import Tokenizer
from megatron_iwsft.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# Private-use code point: marks where an assistant's content starts under a template without a generation prompt.
_MARK = "\ue000"

# Shapes of conversation whose plan is kept; further ones are rendered each time.
_MAX_PLANS = 4096

PRESETS = {
    # The format of Qwen and many others.
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # For tokenizers with no chat tokens: only a beginning- and an end-of-text token are needed.
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
    """A conversation of texts alone: `shape` is one role a turn, followed by "content" where the turn's text is its reasoning and
    its content comes as another; `texts` go with it. What else messages may hold (tool calls, names) needs them whole."""

    shape: tuple[str, ...]
    texts: list[str]
    whole: Messages | None = None
    tools: Any = None

    @property
    def messages(self) -> Messages:
        return self.whole if self.whole is not None else _messages(self.shape, self.texts)


def _messages(shape: Sequence[str], texts: Sequence[str]) -> Messages:
    out: list[dict[str, str]] = []
    for role, text in zip(shape, texts, strict=True):
        if role == "content":
            out[-1] |= {"reasoning_content": out[-1]["content"], "content": text}
        else:
            out.append({"role": role, "content": text})
    return out


class TemplateError(ValueError):
    """A conversation that the template cannot render; the record is dropped with this `reason`."""

    def __init__(self, detail: str, reason: str = "template cannot render it") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Rendering:
    """How conversations become text.

    roles     of the turns that are trained on: assistant, user or both; system, developer and tool turns never are
    turns     all of them, or only the last of the conversation
    thinking  what stands before and after an assistant's reasoning under a template that does not render it itself
    """

    roles: tuple[str, ...] = ("assistant",)
    turns: Literal["all", "last"] = "all"
    thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")

    def __post_init__(self) -> None:
        if not self.roles or not set(self.roles) <= {"assistant", "user"}:
            raise DataError(
                f"turns of the roles {', '.join(self.roles) or '(none)'} cannot be trained on: --train-role takes assistant and user."
            )


class ChatTemplate:
    """A Jinja chat template bound to a tokenizer.

    Raises DataError if the tokenizer has no template and none is named, or if the template is not valid Jinja or leaves an
    assistant turn without an end-of-turn token (the model would never learn to stop).
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None, rendering: Rendering = Rendering()) -> None:
        source = PRESETS.get(name) if name else tokenizer.chat_template
        if source is None and name:
            raise DataError(f"no template is called {name!r}; there are: {', '.join(PRESETS)}.")
        if source is None:
            raise DataError(
                f"the tokenizer has no chat template. Name one with --template ({', '.join(PRESETS)}), or add "
                "chat_template.jinja to the tokenizer's directory."
            )
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self.source, self.rendering = source, rendering
        self._tokenizer = tokenizer
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._traceable = traceable(environment, source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}") from None
        self._variables = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._plans: dict[tuple[str, ...], Plan | None] = {}
        self._check_end_of_turn()
        self.renders_reasoning = self._probe_reasoning()

    def _check_end_of_turn(self) -> None:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            rendered = self.render(probe)
        except TemplateError as error:
            raise DataError(f"the chat template cannot render a question and an answer: {error}") from None
        if self._tokenizer.ends_with_special(rendered) is None:
            raise DataError(
                "the template does not end an assistant turn with a special token of this tokenizer, so that the model would "
                f"never learn to stop. It renders {rendered!r}; the special tokens are "
                f"{', '.join(sorted(self._tokenizer.special)) or 'none'}. Choose another template with --template."
            )

    def _probe_reasoning(self) -> bool:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "\ue003"}]
        try:
            return "\ue003" in self.render(probe)
        except TemplateError:
            return False

    def render(self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises TemplateError with the template's own complaint."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, **self._variables
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the template refuses it: {error}") from None
        except (TypeError, AttributeError, KeyError) as error:
            raise TemplateError(f"the template fails on it: {error}") from None

    def pieces(self, conversation: Conversation) -> tuple[list[str], Plan | None, tuple[bool, ...]]:
        """(texts, plan, trained): pieces that concatenate to the rendered conversation, by which plan if by one, and which of them
        are trained on.

        Raises TemplateError if no turn of the conversation is trained on, or if the template rewrites earlier turns, so that
        what precedes an answer in the whole is not what the model would see when giving it.
        """
        if conversation.whole is None and self._traceable:
            plan = self._plan(conversation.shape)
            filled = plan.fill(conversation.texts) if plan is not None else None
            if plan is not None and filled is not None:
                return filled, plan, plan.trained
        pieces = self.render_pieces(conversation.messages, conversation.tools)
        return [text for text, _ in pieces], None, tuple(trained for _, trained in pieces)

    def _plan(self, shape: tuple[str, ...]) -> Plan | None:
        if shape in self._plans:
            return self._plans[shape]
        if len(self._plans) == _MAX_PLANS:
            return None
        plan = self._plans[shape] = trace(len(shape), lambda probes: self.render_pieces(_messages(shape, probes)))
        return plan

    def render_pieces(self, messages: Messages, tools: Any = None) -> list[tuple[str, bool]]:
        """As `pieces`, always by rendering the template: [(text, trained)] that concatenate to `render(messages)`."""
        if not self.renders_reasoning:
            messages = [self._inline_reasoning(m) for m in messages]
        full = self.render(messages, tools=tools)
        chosen = [i for i, m in enumerate(messages) if m.get("role") in self.rendering.roles]
        if not chosen:
            raise TemplateError(f"there is none of {' or '.join(self.rendering.roles)}", "no turn to train on")
        out: list[tuple[str, bool]] = []
        at = 0
        for i in chosen if self.rendering.turns == "all" else chosen[-1:]:
            start, end = self._turn(messages, i, tools)
            if start < at or not full.startswith(self.render(messages[: i + 1], tools=tools)[:end]):
                raise TemplateError(f"the template rewrites turn {i} once later turns follow")
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
        """Where turn i starts and ends in the rendering of the messages up to it."""
        through = self.render(messages[: i + 1], tools=tools)
        before = self.render(messages[:i], tools=tools) if i else ""
        assistant = messages[i]["role"] == "assistant"
        prompt = self.render(messages[:i], tools=tools, add_generation_prompt=True) if assistant and i else before
        if prompt == before:  # no generation prompt: the turn starts where its content does
            start = self._content_start(messages, i, tools, through)
        elif through.startswith(prompt):
            start = len(prompt)
        else:
            raise TemplateError(f"the generation prompt before turn {i} is not what the template puts there")
        end = self._tokenizer.ends_with_special(through[start:])
        if end is None:
            raise TemplateError(f"turn {i} does not end with an end-of-turn token")
        return start, start + end

    def _content_start(self, messages: Messages, i: int, tools: Any, through: str) -> int:
        field = "reasoning_content" if messages[i].get("reasoning_content") is not None else "content"
        text = messages[i].get(field)
        if text is None:
            raise TemplateError(f"turn {i} has no text, and the template no generation prompt, to tell where it starts")
        marked = self.render([*messages[:i], {**messages[i], field: _MARK + text}], tools=tools)
        start = marked.find(_MARK)
        if start < 0 or marked.replace(_MARK, "", 1) != through:
            raise TemplateError(f"the template changes the content of turn {i}")
        return start


def _environment() -> jinja2.Environment:
    """The environment that `transformers` renders chat templates in."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
    return environment
