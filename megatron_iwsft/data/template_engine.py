"""Run a chat template: Jinja as `transformers` runs it, in a sandbox with limits, with a fixed date."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from megatron_iwsft.data.conversation import Messages
from megatron_iwsft.data.template_tracing import Untraceable, traceable
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.limits import TimeLimit, limits

# A template is a program that came with a tokenizer, and renders whatever a record contains. These are limits for one conversation.
_SECONDS, _EXTRA_BYTES = 30.0, 2 << 30
_MAX_BITS, _MAX_LENGTH = 4096, 1 << 26  # of numbers, and of repeated strings and lists

# Private-use code points that a {% generation %} block writes around its text.
_OPEN, _CLOSE = "\ue004", "\ue005"


class TemplateError(ValueError):
    """The template cannot render this conversation. The record is dropped with this `reason`."""

    def __init__(self, detail: str, reason: str = "template cannot render it") -> None:
        super().__init__(detail)
        self.reason = reason


class TooSlow(TemplateError):
    """The template takes more time for this conversation than it is given."""


class Rendered(NamedTuple):
    """A rendered conversation: its text, and (start, end) of what {% generation %} blocks wrote."""

    text: str
    generated: list[tuple[int, int]]


class Template:
    """A compiled chat template.

    `variables` are the tokenizer's special tokens, by their names in the template. `date` is what `strftime_now` formats. Raises
    DataError if `source` is not valid Jinja.

    traceable         whether `template_tracing` can follow it
    marks_generation  whether it has {% generation %} blocks
    """

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date) -> None:
        environment = _environment(date)
        self._variables = variables
        try:
            with limits(seconds=_SECONDS, extra_bytes=_EXTRA_BYTES):
                self._template = environment.from_string(source)
                self.traceable = traceable(environment, source)
                tree = environment.parse(source)
        except Exception as error:  # Python's compiler raises many kinds: RecursionError, MemoryError, SyntaxError …
            raise DataError(
                f"the chat template is not valid Jinja: {_one_line(error)}. "
                "Correct it in the tokenizer's directory, or choose another with --template."
            ) from None
        self.marks_generation = any(node.data == _OPEN for node in tree.find_all(nodes.TemplateData))

    def render(
        self,
        messages: Messages,
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation as text. Raises TemplateError with the template's own message, whatever the template raises."""
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **{**self._variables, **(options or {})},
            )
        except (Untraceable, TimeLimit):
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the template raised an error: {_one_line(error)}") from None
        except Exception as error:
            raise TemplateError(f"the template failed: {_one_line(error)}") from None
        return _without_marks(text) if self.marks_generation else Rendered(text, [])


def _without_marks(marked: str) -> Rendered:
    head, *parts = marked.split(_OPEN)
    text, spans = head, []
    for part in parts:
        inside, mark, after = part.partition(_CLOSE)
        if not mark or _CLOSE in after:
            raise TemplateError(
                "the conversation contains the code points U+E004 or U+E005, or generation blocks are nested"
            )
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, spans)


@contextmanager
def limited() -> Iterator[None]:
    """Raise TemplateError if rendering one conversation takes too long or too much memory."""
    try:
        with limits(seconds=_SECONDS, extra_bytes=_EXTRA_BYTES):
            yield
    except TimeLimit:
        raise TooSlow(f"the template took longer than {_SECONDS:g} seconds of CPU time") from None


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


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} around what the model writes, as `transformers` defines it."""

    tags = {"generation"}  # noqa: RUF012 — jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPEN, _CLOSE)]
        return [marks[0], *body, marks[1]]


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    """Jinja's filter, which computes 10 ** precision, for a precision that a number can have."""
    if not -400 <= precision <= 400:
        raise OverflowError(f"round to {precision:.0e} digits")
    return jinja2.filters.do_round(value, precision, method)


def _environment(date: datetime.date) -> jinja2.Environment:
    """The Jinja environment that `transformers` uses for chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = tojson
    environment.filters["round"] = _round
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment
