"""Published tokenizers and templates: training text compared with `apply_chat_template`."""

from __future__ import annotations

import pytest

from megatron_iwsft.data.chat_template import ChatTemplate, Trajectory
from megatron_iwsft.data.prepare.messages import MessageReader
from megatron_iwsft.data.template_engine import TemplateError
from megatron_iwsft.data.tokenizer import load_tokenizer
from tests.support import real

pytestmark = [pytest.mark.real, pytest.mark.slow]

TOOLS = {"a tool call", "a tool call with its result"}
REASONING = {
    *("reasoning", "reasoning in several turns"),
    *("reasoning between tags", "reasoning between tags in several turns"),
}
CASES = {  # tokenizer, template of ours → the conversations that are dropped, and the number of trajectories
    ("qwen2_5", None): (set(), 11),
    ("qwen3", None): (set(), 17),
    ("mistral_nemo", None): (set(), 12),
    ("llama3_2", None): (set(), 11),
    ("deepseek_v3", None): (TOOLS, 9),  # writes no end-of-turn token after a single tool call
    ("deepseek_r1_january", None): (TOOLS | REASONING, 5),  # renders no reasoning
    ("deepseek_r1_distill", None): (TOOLS, 14),
    ("deepseek_r1_distill", "deepseek-r1"): (TOOLS, 14),
    ("gemma3", None): (TOOLS, 9),
    ("SmolLM2-135M-Instruct", None): (TOOLS, 9),
}


@pytest.mark.parametrize(("name", "template"), CASES, ids=str)
def test_training_text_is_that_of_apply_chat_template(name: str, template: str | None) -> None:
    directory = real.smollm2() if name.startswith("SmolLM2") else real.tokenizer(name)
    row = real.bench("templates").compare(name, directory, template)
    dropped, trajectories = CASES[name, template]
    assert set(row.dropped) == dropped, row.dropped
    assert row.trajectories == trajectories
    assert row.all_equal, row


def test_tool_calls_of_the_published_r1_template() -> None:
    """It ends a turn of two calls, but not of one: the model would never learn to stop there. It shows no definitions of tools."""
    bench = real.bench("templates")
    directory = real.tokenizer("deepseek_r1_distill")
    tokenizer = load_tokenizer(directory)
    chat, theirs = ChatTemplate(tokenizer), bench.Theirs(directory)
    question, call, result, answer = bench.CONVERSATIONS["a tool call with its result"][0]
    other = {**bench.CALL, "id": "bcdefghij", "function": {"name": "get_time", "arguments": {"zone": "Rome"}}}
    two, results = (
        {**call, "tool_calls": [bench.CALL, other]},
        [result, {**result, "tool_call_id": other["id"], "content": "noon"}],
    )

    def render(*messages: dict, tools: list | None = None) -> list[Trajectory]:
        return chat.trajectories(MessageReader().read(list(messages), tools=tools))

    for content in ("", None):
        messages = [question, {**two, "content": content}, *results, answer]
        trajectories = render(*messages)
        assert [trajectory.last_turn for trajectory in trajectories] == [1, 4]
        for trajectory in trajectories:
            prompt, written = theirs.prompt_and_answer(messages, trajectory.last_turn, None)
            assert (
                "".join(text for text, turn in zip(trajectory.texts, trajectory.turns, strict=True) if turn) == written
            )
            assert "".join(trajectory.texts) == prompt + written
        first, last = ("".join(trajectory.texts) for trajectory in trajectories)
        assert all(text in first for text in ("get_weather", 'the \\"X\\"', "get_time", "Rome"))
        assert "sunny, 21 degrees" in last and "noon" in last
    for dropped, tools, message in (
        ([question, call], None, "turn 1 does not end with an end-of-turn token"),
        ([question, two], bench.TOOLS, "the definition of a tool"),
        ([question, {**two, "content": "I look."}], None, "a tool call of turn 1"),
    ):
        with pytest.raises(TemplateError, match=message):
            render(*dropped, tools=tools)
    with pytest.raises(TemplateError, match="a tool call of turn 1"):
        ChatTemplate(tokenizer, "deepseek-r1").trajectories(MessageReader().read([question, two]))
