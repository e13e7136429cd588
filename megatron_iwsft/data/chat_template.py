"""Chat templates: render a conversation as trajectories, in pieces of text that are either trained on or not.

What a trained turn is conditioned on is what inference would give the model for it: the template's rendering of the turns before,
with the generation prompt. What it is trained to write is the rest of the template's rendering up to the end-of-turn token. Turns share a
trajectory as long as each sees the earlier ones as they were trained; where the template rewrites earlier turns (Qwen3 drops
their reasoning), the next turn starts another trajectory.

Reasoning (`reasoning_content` of an assistant message) is rendered by the template if it supports that; otherwise it is put
between thinking tags before the content.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from megatron_iwsft.data.conversation import (
    Conversation,
    Messages,
    TrainFlags,
    equivalent_forms,
    messages_of,
    separate_reasoning,
    shape_of,
)
from megatron_iwsft.data.lost_text import fence, fenced, find_lost_text, marked
from megatron_iwsft.data.template_defaults import DEFAULT_DATE, TemplateVariables
from megatron_iwsft.data.template_engine import Template, TemplateError, TooSlow, limited
from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.data.template_tracing import Pieces, Trace, TracedFrame, trace
from megatron_iwsft.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from megatron_iwsft.errors import DataError

# Private-use code point that marks where a content starts.
_MARK = "\ue000"

# Conversation shapes whose traces are cached. Conversations of further shapes are rendered by Jinja.
_MAX_TRACES = 4096

# The names under which templates look for an assistant's reasoning.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

LOST = "text is missing in the rendering"
SEVERAL_TURNS = "one turn is rendered as several"
CONTROL = "control token in content"


class Trajectory(NamedTuple):
    """A rendered trajectory: pieces of text that concatenate to it.

    turns  for each piece, the index of the message whose text it trains; None where it is not trained on
    frame  the traced frame that rendered it, None if Jinja did
    """

    texts: list[str]
    turns: tuple[int | None, ...]
    frame: TracedFrame | None = None

    @property
    def last_turn(self) -> int:
        return max(turn for turn in self.turns if turn is not None)


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered and which turns are trained on.

    roles     roles whose turns are trained on: assistant, user or both; never system, developer or tool
    turns     train on all turns of these roles, or only on the last
    thinking  tags before and after an assistant's reasoning, for templates that do not render reasoning themselves
    options   (name, value as JSON) of further variables for the template, such as ("enable_thinking", "false")
    date      what a template that asks for today's date gets, as YYYY-MM-DD
    """

    roles: tuple[str, ...] = ("assistant",)
    turns: Literal["all", "last"] = "all"
    thinking: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    options: tuple[tuple[str, str], ...] = ()
    date: str = DEFAULT_DATE

    def __post_init__(self) -> None:
        if not self.roles or not set(self.roles) <= {"assistant", "user"}:
            raise DataError(
                f"cannot train on turns of the roles {', '.join(self.roles) or '(none)'}: --train-role takes assistant and user."
            )
        TemplateVariables(self.date, self.options)  # checks them


class ChatTemplate:
    """A Jinja chat template bound to a tokenizer.

    `name` selects one of PRESETS instead of the tokenizer's own template. Raises DataError if the tokenizer has no template and
    no name is given, if the name is unknown, or if the template is not valid Jinja or does not end an assistant turn with an
    end-of-turn token (the model would never learn to stop).

    reasoning_key    the key of a message under which the template looks for reasoning; None if it renders none
    opens_reasoning  whether the generation prompt ends with the opening thinking tag
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
        self.tokenizer = tokenizer
        variables = TemplateVariables(rendering.date, rendering.options)
        self._template = Template(source, tokenizer.template_variables, variables.day)
        self._options = variables.values
        self._traces: dict[Any, Trace | None] = {}
        self._shapes: dict[Any, int | None] = {}  # of checked conversations → control tokens that the template writes
        self._open, self._close = (tag.strip() for tag in rendering.thinking)
        self._opening = re.compile(f"{re.escape(self._open)}\\s*$") if self._open else re.compile("(?!)")
        question = [{"role": "user", "content": "a"}]
        try:
            with limited():
                self._header = self._check_answer()
                prompt = self.render(question, add_generation_prompt=True)
                self.opens_reasoning = self._opening.search(prompt) is not None
                self.reasoning_key = self._probe_reasoning()
                self._reads_thinking = self._probe_thinking()
                self._cuts_history = self._reads_thinking and self._probe_history()
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot render a question and an answer: {error}. Choose another with --template."
            ) from None

    def _check_answer(self) -> str:
        """What the template writes before an answer that its generation prompt does not. Raises DataError for an unsuitable one."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self.render(probe)
        if self.tokenizer.ends_with_special(rendered) is None:
            raise DataError(
                "the template does not end an assistant turn with a special token of this tokenizer, so the model would "
                f"never learn to stop. It renders {rendered!r}; the special tokens are "
                f"{', '.join(sorted(self.tokenizer.special)) or 'none'}. Choose another template with --template."
            )
        before = self.render(probe[:1])
        if self.render(probe[:1], add_generation_prompt=True) != before or not rendered.startswith(before):
            return ""
        marked = self.render([probe[0], {**probe[1], "content": f"{_MARK}b"}])
        return marked[len(before) : max(marked.find(_MARK), len(before))]

    def _probe_reasoning(self) -> str | None:
        """The key under which the template renders reasoning; None if it renders none."""
        for key in _REASONING_KEYS:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: _MARK}]
            try:
                if _MARK in self.render(probe):
                    return key
            except TemplateError:
                continue
        return None

    def _probe_thinking(self) -> bool:
        """Whether thinking tags in a content mean something: to the tokenizer, or to the template, which then changes the content."""
        if not self._open or not self._close:
            return False
        if self.tokenizer.control_pattern.search(self._open + self._close):
            return True
        content = f"{self._open}\n{_MARK}\n{self._close}\n\nb"
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": content}
        try:
            changed = any(content not in self.render([question, answer, *more]) for more in ([], [question]))
        except TemplateError:
            return False
        return changed or self.opens_reasoning

    def _probe_history(self) -> bool:
        """Whether an earlier answer with thinking tags inside is rendered otherwise than one whose reasoning is separate.

        DeepSeek-R1's cuts it at the closing tag, and keeps the line breaks that follow.
        """
        question = {"role": "user", "content": "a"}
        before, after = self.rendering.thinking
        inside = {"role": "assistant", "content": f"{before}{_MARK}{after}b"}
        separate = self._with_reasoning({"role": "assistant", "content": "b", "reasoning_content": _MARK})
        try:
            return self.render([question, inside, question]) != self.render([question, separate, question])
        except TemplateError:
            return False

    def render(
        self,
        messages: Messages,
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises TemplateError with the template's own message, whatever the template raises."""
        return self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            options={**self._options, **(options or {})},
        ).text

    def trajectories(self, conversation: Conversation) -> list[Trajectory]:
        """The conversation as trajectories, in the order of their last turns.

        Raises TemplateError if no turn of the conversation is trained on; if the template leaves out or changes a text; if the
        generation prompt is not what the template renders before a trained turn; or if rendering takes too long.
        """
        plain = conversation.full_messages is None and not conversation.options and not conversation.earlier
        if plain and self._template.traceable:
            found = self._trace_of(conversation)
            if found is not None and found.accepts(conversation.texts):
                return [Trajectory(frame.fill(conversation.texts), frame.turns, frame) for frame in found.frames]
        with limited():
            return [
                Trajectory([text for text, _ in pieces], tuple(turn for _, turn in pieces))
                for pieces in self.render_trajectories(conversation)
            ]

    def _trace_of(self, conversation: Conversation) -> Trace | None:
        shape = conversation.shape
        key = shape, conversation.train
        if key in self._traces:
            return self._traces[key]
        if len(self._traces) == _MAX_TRACES:
            return None

        def render(probes: list[Any]) -> list[Pieces]:
            return self._render_all(messages_of(shape, probes), conversation)

        try:
            with limited():
                found = trace(len(shape), render)
        except TooSlow:
            raise
        except TemplateError:  # which would quote the probes
            found = None
        # A probe may be missing in a rendering that drops texts: such conversations are rendered one by one, and then dropped.
        self._traces[key] = found if found is not None and found.complete(shape) else None
        return self._traces[key]

    def render_trajectories(self, conversation: Conversation) -> list[Pieces]:
        """`trajectories`, always rendered by Jinja: for each trajectory [(text, turn that it trains or None)]."""
        errors = []
        for messages in equivalent_forms(conversation.messages):
            try:
                return self._render_checked(messages, conversation)
            except TemplateError as error:
                errors.append(error)
        raise max(errors, key=_comes_closest)

    def _render_checked(self, messages: Messages, conversation: Conversation) -> list[Pieces]:
        tools = conversation.tools
        rendered = self._render_all(messages, conversation)
        self._check_lost(messages, rendered, tools, options=conversation.options)
        key = shape_of(messages), conversation.train, len(tools or ()), repr(conversation.options)
        if key in self._shapes:
            controls = self._shapes[key]
        else:
            controls = self._check_shape(messages, conversation)
            if len(self._shapes) < _MAX_TRACES:
                self._shapes[key] = controls
        if self._count_controls(rendered) != controls:
            self._check_controls(messages, rendered, conversation)
        return rendered

    def _check_shape(self, messages: Messages, conversation: Conversation) -> int | None:
        """`_check_lost` with texts that occur nowhere else: a short text may also be found in another turn.

        Returns how many control tokens the template writes around these texts, None if it does not take them.
        """
        unique, tools, originals = marked(messages, conversation.tools)
        try:
            rendered = self._render_all(unique, replace(conversation, tools=tools, earlier=None))
        except TemplateError:
            return None  # the template requires something of the texts
        self._check_lost(unique, rendered, tools, originals)
        return self._count_controls(rendered)

    def _check_controls(self, messages: Messages, rendered: list[Pieces], conversation: Conversation) -> None:
        """Raise TemplateError if a text forms a control token together with the template's text around it."""
        apart, tools = fenced(messages, conversation.tools)
        earlier = {turn: fence(text) for turn, text in (conversation.earlier or {}).items()}
        try:
            expected = self._render_all(apart, replace(conversation, tools=tools, earlier=earlier))
        except TemplateError:
            return  # the template requires something of the texts
        if self._count_controls(rendered) > self._count_controls(expected):
            raise TemplateError("a text forms one together with the template text around it", CONTROL)

    def _count_controls(self, rendered: list[Pieces]) -> int:
        find = self.tokenizer.control_pattern.findall
        return sum(len(find(text)) for pieces in rendered for text, _ in pieces)

    def _check_lost(
        self,
        messages: Messages,
        rendered: list[Pieces],
        tools: Any,
        originals: Mapping[Any, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        for pieces in rendered:
            trained = {turn for _, turn in pieces if turn is not None}
            text = "".join(text for text, _ in pieces)
            said = messages[: max(trained) + 1]
            lost = find_lost_text(said, text, trained=trained, tools=tools, options=options, originals=originals)
            if lost:
                advice = _NAME if lost.startswith("the name") else _ADVICE
                if lost.startswith("the reasoning") and "<｜Assistant｜>" in self.source:
                    advice = _R1
                raise TemplateError(f"the template leaves out or changes {lost}; {advice}", LOST)

    def _render_all(self, messages: Messages, conversation: Conversation) -> list[Pieces]:
        """The messages of the conversation, in one of their forms, as `render_trajectories`, unchecked."""
        turns = self._trained_turns(messages, conversation.train)
        forms = [self._with_reasoning(m) for m in messages]
        before = [self._as_earlier(form, i, conversation.earlier or {}) for i, form in enumerate(forms)]
        options = {**self._options, **(conversation.options or {})}
        render = partial(self._template.render, tools=conversation.tools, options=options)
        self._check_calls_before(before, turns, render)
        out: list[Pieces] = []
        text = tail = ""
        for i in turns:
            turn = self._turn([*before[:i], forms[i]], i, render)
            if out and turn.context.startswith(text):
                new = turn.context[len(text) :]
            else:
                if out:
                    out[-1].append((tail, None))
                out.append([])
                new = turn.context
            out[-1] += [(new, None), *((part, i if trained else None) for part, trained in turn.parts)]
            text, tail = turn.context + "".join(part for part, _ in turn.parts), turn.tail
        full = render([*before[:i], *forms[i:]]).text
        out[-1].append((full[len(text) :] if full.startswith(text) else tail, None))
        return [[(part, turn_) for part, turn_ in pieces if part] for pieces in out]

    def _trained_turns(self, messages: Messages, train: TrainFlags | None) -> list[int]:
        by_role = [i for i, m in enumerate(messages) if m.get("role") in self.rendering.roles]
        chosen = by_role if self.rendering.turns == "all" else by_role[-1:]
        if train is not None:
            chosen = [i for i, flag in enumerate(train) if (flag if flag is not None else i in chosen)]
        if not chosen:
            raise TemplateError(
                f"there is no turn of {' or '.join(self.rendering.roles)} to train on", "no turn to train on"
            )
        return chosen

    def _with_reasoning(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message as the template takes its reasoning."""
        reasoning = message.get("reasoning_content")
        if reasoning is None or self.reasoning_key == "reasoning_content":
            return message
        rest = {k: v for k, v in message.items() if k != "reasoning_content"}
        if self.reasoning_key is not None:
            return rest | {self.reasoning_key: reasoning}
        if self.opens_reasoning:
            return message  # `_turn` puts it behind the generation prompt
        before, after = self.rendering.thinking
        return rest | {"content": before + reasoning + after + (message.get("content") or "")}

    @staticmethod
    def _as_earlier(message: Mapping[str, Any], i: int, earlier: Mapping[int, str]) -> Mapping[str, Any]:
        """Message i as the prompts of later turns show it."""
        if i not in earlier:
            return message
        return {**{k: v for k, v in message.items() if k not in _REASONING_KEYS}, "content": earlier[i]}

    def _turn(self, messages: Messages, i: int, render: Any) -> _Turn:
        through = render(messages[: i + 1])
        before = render(messages[:i]) if i else None
        base = before.text if before else ""
        answers = messages[i].get("role") == "assistant" and i > 0
        prompt = render(messages[:i], add_generation_prompt=True).text if answers else base
        expected = prompt if prompt != base else base + self._header
        opening = self._opening.search(prompt) if prompt != base else None
        prefix = ""  # of what the model writes, before what the template renders
        if answers and through.text.startswith(expected):
            context, start = expected, len(expected)
        elif opening is not None and through.text.startswith(prompt[: opening.start()]):
            # The generation prompt opens the reasoning, and the template renders none of it.
            context, start = prompt, opening.start()
            prefix = self._close_reasoning(messages[i], through.text[start:])
        elif prompt == base:
            start = self._content_start(messages, i, through.text, render)
            context = through.text[:start] if not answers or through.text.startswith(base) else prompt + self._header
        else:
            # The template renders the turn before otherwise than inference does, as for two answers in a row.
            context, start = prompt, self._header_end(messages, i, through.text, prompt.removeprefix(base), render)
        end = self.tokenizer.ends_with_special(through.text[start:])
        if end is None:
            raise TemplateError(
                f"turn {i} does not end with an end-of-turn token: the model would never learn to stop there, which no --template "
                "repairs; correct the tokenizer's template, or leave the record out"
            )
        header = self._opening.sub("", prompt[len(base) :]) if prompt.startswith(base) else ""
        self._check_one_turn(through.text[start : start + end], i, header=header)
        parts = [(prefix, True), (through.text[start : start + end], True)]
        if self._template.marks_generation:
            spans = through.generated[len(before.generated) if before else 0 :]
            if not spans:
                raise TemplateError(f"no generation block of the template contains turn {i}", "no turn to train on")
            parts = [(prefix, True), *self._marked_parts(through.text, start, start + end, spans)]
        return _Turn(context, parts, through.text[start + end :])

    def _check_calls_before(self, messages: Messages, turns: list[int], render: Any) -> None:
        """`_check_one_turn` for tool calls that are not trained on, but in the prompt of a trained turn."""
        for i, message in enumerate(messages[: turns[-1]]):
            if i not in turns and message.get("tool_calls"):
                self._check_one_turn(render(messages[: i + 1]).text, i, before=render(messages[:i]).text)

    def _check_one_turn(self, text: str, i: int, *, before: str = "", header: str = "") -> None:
        """Raise TemplateError if turn i is rendered as several, such as a tool call and an answer of its own.

        It is `text` without `before`; `header` is what the generation prompt adds.
        """
        *_, inside = self.tokenizer.special_pattern.findall(text) or [""]
        several = inside != "" and text.count(inside) - before.count(inside) > 1
        if self.tokenizer.control_pattern.search(header) and header in text:
            several, inside = True, header
        if several:
            raise TemplateError(
                f"the template renders turn {i} as several turns: inside is {inside!r}. Use a template that renders a tool call and "
                "the content beside it in one turn, or leave the content out",
                SEVERAL_TURNS,
            )

    def _close_reasoning(self, message: Mapping[str, Any], answer: str) -> str:
        if answer.lstrip().startswith(self._open):
            raise TemplateError("the generation prompt opens the reasoning in another way than the template renders it")
        return str((message.get("reasoning_content") or "") + self.rendering.thinking[1])

    def _marked_parts(
        self, text: str, start: int, end: int, spans: list[tuple[int, int]]
    ) -> Iterator[tuple[str, bool]]:
        """text[start:end], trained on inside the {% generation %} blocks `spans`, and on the end-of-turn token."""
        at = start
        for k, (first, last) in enumerate(spans):
            first, last = max(first, at), min(last, end)
            if k == len(spans) - 1 and not self.tokenizer.special_pattern.sub("", text[last:end]).strip():
                last = end
            yield text[at:first], False
            yield text[first:last], True
            at = max(at, last)
        yield text[at:end], False

    def _header_end(self, messages: Messages, i: int, through: str, header: str, render: Any) -> int:
        """Where the last `header`, which ends the generation prompt, before the content of turn i ends."""
        start = through.rfind(header, 0, self._content_start(messages, i, through, render))
        if start < 0 or not self.tokenizer.control_pattern.search(header):
            raise TemplateError(
                f"the generation prompt differs from what the template renders before turn {i}: it ends {header[-40:]!r}, which is missing"
            )
        return start + len(header)

    def _content_start(self, messages: Messages, i: int, through: str, render: Any) -> int:
        key = self.reasoning_key
        field = key if key is not None and messages[i].get(key) is not None else "content"
        text = messages[i].get(field)
        if not text:  # a tool call: it starts where the text of an answer would
            marked = render([*messages[:i], {"role": messages[i]["role"], "content": _MARK}]).text
            start = marked.find(_MARK)
            if start < 0 or marked[:start] != through[:start]:
                raise TemplateError(f"cannot find the start of turn {i}, which has no text")
            return start
        marked = render([*messages[:i], {**messages[i], field: _MARK + text}]).text
        start = marked.find(_MARK)
        if start < 0 or marked.replace(_MARK, "", 1) != through:
            raise TemplateError(f"the template changes the content of turn {i}")
        return start

    def separate_reasoning(self, conversation: Conversation) -> Conversation:
        """The conversation with reasoning that stands between thinking tags inside an answer as the answer's reasoning.

        Only if the tags mean something to the tokenizer or the template; otherwise they are ordinary text.
        """
        if not self._reads_thinking or not any(self._close in text for text in conversation.texts):
            return conversation
        separate = separate_reasoning(conversation, self._open, self._close)
        if not self._cuts_history:
            return separate
        given, last = conversation.messages, len(separate.messages) - 1
        earlier = {
            i: given[i]["content"]
            for i, message in enumerate(separate.messages)
            if i < last and message.get("content") != given[i].get("content")
        }
        return replace(separate, earlier=earlier or None)


class _Turn(NamedTuple):
    """A trained turn: what inference gives the model before it, its text as (part, trained), and what the template renders after it."""

    context: str
    parts: list[tuple[str, bool]]
    tail: str


def _comes_closest(error: TemplateError) -> tuple[bool, ...]:
    """Orders the errors of equivalent forms: one that the template cannot take, or renders in part, says little about the record."""
    return (
        not str(error).startswith("the template failed"),
        not str(error).startswith("the template raised"),
        error.reason != LOST,
        error.reason != SEVERAL_TURNS,
        "changes the definition" in str(error),  # looked for last, when everything in the messages was found
    )


_ADVICE = "use a template that renders it, or change the record"
_NAME = "use a template that renders it, or read over it with --ignore-key name"
_R1 = "use --template deepseek-r1, which renders the reasoning of DeepSeek-R1 and its distillations"
