"""Chat templates: a conversation → pieces of text, each either trained on or not.

What is trained on is decided by position while rendering: an assistant turn starts where the template's generation prompt
ends (exactly what the model will see when it has to answer) and ends after its end-of-turn token.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from megatron_iwsft.data.tokenizer import Tokenizer
from megatron_iwsft.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# Private-use code point: marks where an assistant's content starts under a template without a generation prompt.
_MARK = "\ue000"

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


class TemplateError(ValueError):
    """A conversation that the template cannot render; the record is dropped with this reason."""


class ChatTemplate:
    """A Jinja chat template bound to a tokenizer.

    Raises DataError if the tokenizer has no template and none is named, or if the template is not valid Jinja or leaves an
    assistant turn without an end-of-turn token (the model would never learn to stop).
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None) -> None:
        source = PRESETS.get(name) if name else tokenizer.chat_template
        if source is None and name:
            raise DataError(f"no template is called {name!r}; there are: {', '.join(PRESETS)}.")
        if source is None:
            raise DataError(
                f"the tokenizer has no chat template. Name one with --template ({', '.join(PRESETS)}), or add "
                "chat_template.jinja to the tokenizer's directory."
            )
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self.source = source
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}") from None
        self._variables = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._check_end_of_turn()

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

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises TemplateError with the template's own complaint."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._variables
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the template refuses it: {error}") from None
        except (TypeError, AttributeError, KeyError) as error:
            raise TemplateError(f"the template fails on it: {error}") from None

    def pieces(self, messages: Messages) -> list[tuple[str, bool]]:
        """[(text, trained)] that concatenate to `render(messages)`; assistant turns are trained on.

        Raises TemplateError if the conversation has none, or if the template rewrites earlier turns, so that what precedes an
        answer in the whole is not what the model would see when giving it.
        """
        full = self.render(messages)
        out: list[tuple[str, bool]] = []
        at = 0
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            start, end = self._turn(messages, i)
            if start < at or not full.startswith(self.render(messages[: i + 1])[:end]):
                raise TemplateError(f"the template rewrites turn {i} once later turns follow")
            out += [(full[at:start], False), (full[start:end], True)]
            at = end
        out.append((full[at:], False))
        return [(text, trained) for text, trained in out if text]

    def _turn(self, messages: Messages, i: int) -> tuple[int, int]:
        """Where assistant turn i starts and ends in the rendering of the messages up to it."""
        through = self.render(messages[: i + 1])
        prompt = self.render(messages[:i], add_generation_prompt=True)
        if prompt == self.render(messages[:i]):  # no generation prompt: the answer starts where its content does
            marked = self.render([*messages[:i], {**messages[i], "content": _MARK + messages[i]["content"]}])
            start = marked.find(_MARK)
            if start < 0 or marked.replace(_MARK, "", 1) != through:
                raise TemplateError(f"the template changes the content of turn {i}")
        elif through.startswith(prompt):
            start = len(prompt)
        else:
            raise TemplateError(f"the generation prompt before turn {i} is not what the template puts there")
        answer = through[start:]
        end = self._tokenizer.ends_with_special(answer)
        if end is None:
            raise TemplateError(f"turn {i} does not end with an end-of-turn token")
        return start, start + end


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
