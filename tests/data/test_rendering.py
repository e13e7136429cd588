"""What a record says is found in the training text, and a trained turn follows the text that inference gives for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_iwsft.data.chat_template import LOST, SEVERAL_TURNS, ChatTemplate, Rendering, Trajectory
from megatron_iwsft.data.conversation import Conversation
from megatron_iwsft.data.prepare.messages import Dropped, MessageReader
from megatron_iwsft.data.template_engine import TemplateError
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny

TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>Q {{ m.content }}"
    "{% elif m.role == 'assistant' %}<|im_start|>A ANSWER<|im_end|>{% else %}OTHER{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A {% endif %}"
)
# As published with DeepSeek-R1's distillations: first with an answer cut at </think>, then also with an opened generation prompt.
CUTTING = TURNS.replace("ANSWER", "{{ m.content.split('</think>')[-1] }}").replace("OTHER", "{{ m.content }}")
OPENING = CUTTING.replace(
    "{% if add_generation_prompt %}<|im_start|>A ", "{% if add_generation_prompt %}<|im_start|>A <think>\n"
)
# As DeepSeek-V3: an answer without content is its tool calls, whose arguments must be text.
NULL_CONTENT = TURNS.replace(
    "ANSWER",
    "{% if m.content is none %}{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}",
).replace("OTHER", "{{ m.content }}")
# As the current template of DeepSeek-R1's distillations: a tool call ends its turn, and a content that is not null is another one.
CALL_THEN_TURN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}<|im_start|>A {% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}"
    "{% endfor %}<|im_end|>{% endif %}{% if m.content is not none %}<|im_start|>A {{ m.content }}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }} {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A <think>\n{% endif %}"
)
# As Qwen3: the arguments of tool calls are objects, a content is always text.
TEXT_CONTENT = TURNS.replace(
    "ANSWER",
    "{% if '</think>' in m.content %}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}",
).replace("OTHER", "{{ m.content }}")
# As Mistral-Nemo: the system prompt stands before the last message, if that is the user's; no generation prompt.
MOVING = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}<|im_start|>{% if loop.last and system is defined %}{{ system }} {% endif %}"
    "{{ m.content }}/{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
MARKED = TURNS.replace("ANSWER", "{% generation %}{{ m.content }}{% endgeneration %}").replace(
    "OTHER", "{{ m.content }}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": 'a "b"', "days": 3}}}


def template(tmp_path: Path, source: str, **rendering) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny.hf_tokenizer(tmp_path, template=source)), rendering=Rendering(**rendering))


def turns(*contents: str | None, system: str | None = None) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def marked(trajectory: Trajectory) -> str:
    pairs = zip(trajectory.texts, trajectory.turns, strict=True)
    return "".join(text if turn is None else f"⟦{text}⟧" for text, turn in pairs).replace("⟧⟦", "")


def render(chat: ChatTemplate, messages: list[dict], **more) -> list[str]:
    conversation = chat.separate_reasoning(MessageReader().read(messages, **more))
    return [marked(trajectory) for trajectory in chat.trajectories(conversation)]


@pytest.mark.parametrize("deepseek", [True, False])
def test_reasoning_that_a_template_cuts_off_drops_the_record(tmp_path: Path, deepseek: bool) -> None:
    messages = turns("7 + 8?", "15")
    messages[1]["reasoning_content"] = "seven and eight"
    source = CUTTING.replace("<|im_start|>A ", "<|im_start|><｜Assistant｜>") if deepseek else CUTTING
    with pytest.raises(TemplateError, match=r"the reasoning of turn 1 \(assistant\)") as error:
        render(template(tmp_path, source), messages)
    assert error.value.reason == LOST and ("--template deepseek-r1" in str(error.value)) == deepseek


@pytest.mark.parametrize("inline", [False, True])
def test_an_opened_generation_prompt_is_followed_by_the_reasoning(tmp_path: Path, inline: bool) -> None:
    messages = turns("7 + 8?", "15", "Double it.", "30")
    for message, reasoning in zip(messages[1::2], ("seven and eight", "twice"), strict=True):
        if inline:
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        else:
            message["reasoning_content"] = reasoning
    chat = template(tmp_path, OPENING)
    first, second = render(chat, messages)
    assert first == "<|im_start|>Q 7 + 8?<|im_start|>A <think>\n⟦seven and eight\n</think>\n\n15<|im_end|>⟧"
    prompt, _, answer = second.partition("⟦")
    assert answer == "twice\n</think>\n\n30<|im_end|>⟧"
    # The template leaves the line breaks after </think>, which are in the record or not.
    assert prompt == chat.render(messages[:3], add_generation_prompt=True)
    assert ("A \n\n15" if inline else "A 15") in prompt


def test_thinking_tags_are_text_where_they_mean_nothing(tmp_path: Path) -> None:
    chat = template(tmp_path, TURNS.replace("ANSWER", "{{ m.content }}"))
    found = render(chat, turns("7 + 8?", "<think>a</think> 15"))
    assert found == ["<|im_start|>Q 7 + 8?<|im_start|>A ⟦<think>a</think> 15<|im_end|>⟧"]


@pytest.mark.parametrize("source", [NULL_CONTENT, TEXT_CONTENT])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", [{"city": 'a "b"', "days": 3}, '{"city": "a \\"b\\"", "days": 3}'])
def test_a_tool_call_is_rendered_in_the_form_that_the_template_takes(
    tmp_path: Path, source: str, content: str | None, arguments: object
) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    messages = [*turns("Rain?"), {"role": "assistant", "content": content, "tool_calls": [call]}]
    (found,) = render(template(tmp_path, source), messages)
    assert found.endswith('⟦CALL weather {"city": "a \\"b\\"", "days": 3}<|im_end|>⟧')


def test_a_tool_call_that_the_template_does_not_render_drops_the_record(tmp_path: Path) -> None:
    chat = template(tmp_path, TURNS.replace("ANSWER", "{{ m.content or '-' }}"))
    messages = [*turns("Rain?"), {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]
    with pytest.raises(TemplateError, match=r"a tool call of turn 1 \(assistant\): 'weather' is missing"):
        render(chat, messages)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Rain or sun.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
SHOWN = "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.description }}{% endfor %}"


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("", "'Rain or sun.' is missing"),
        (SHOWN, "'city' is missing"),
        (SHOWN.replace("t.function.description", "t.function.parameters | tojson"), "'Rain or sun.' is missing"),
        ("{{ tools | tojson }}", None),
    ],
)
def test_a_tool_definition_is_not_found_in_a_call_of_it(tmp_path: Path, shown: str, missing: str | None) -> None:
    chat = template(tmp_path, shown + TEXT_CONTENT)
    messages = [*turns("Rain?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    if missing is None:
        assert len(render(chat, messages, tools=[WEATHER])) == 1
        return
    with pytest.raises(TemplateError, match=f"the definition of a tool: {missing}"):
        render(chat, messages, tools=[WEATHER])


def test_what_templates_seldom_show_is_looked_for_too(tmp_path: Path) -> None:
    """A name on a message, the description of a parameter, a key of a call beside name and arguments."""
    name, description = "{{ t.function.name }}", "{{ t.function.description }}"
    shown = f"{{% for t in tools or [] %}}{name} {description} {{{{ t.function.parameters.properties | join(' ') }}}}{{% endfor %}}"
    chat = template(tmp_path, shown + TEXT_CONTENT)
    city = {"type": "string", "description": "Its English name."}
    tool = {
        **WEATHER,
        "function": {**WEATHER["function"], "parameters": {"type": "object", "properties": {"city": city}}},
    }
    call = {**CALL, "function": {**CALL["function"], "strictly": "metric units"}}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    twice = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "city": "Oslo"}'}}
    assert "Rome" in render(chat, [*turns("Q"), {**called, "tool_calls": [twice]}])[0]
    with pytest.raises(TemplateError, match="the template variable places: 'Rome' is missing"):
        render(chat, turns("Q", "b"), options={"places": ["Rome"], "thinking": True})
    for messages, tools, missing in (
        ([{"role": "user", "content": "Q", "name": "Q"}, *turns("a", "b")[1:]], None, r"the name on turn 0 \(user\)"),
        (turns("Q", "b"), [tool], "the definition of a tool: 'Its English name.' is missing"),
        ([*turns("Q"), {"role": "assistant", "content": "", "tool_calls": [call]}], None, "'metric units' is missing"),
        ([*turns("Q"), called, {"role": "tool", "name": "weather", "content": "no"}, *turns("a", "b")[1:]], None, None),
    ):
        if missing is None:
            assert len(render(chat, messages)) == 1
            continue
        with pytest.raises(TemplateError, match=missing):
            render(chat, messages, tools=tools)
    conversation = MessageReader(ignored=["name"]).read(
        [{"role": "user", "content": "Q", "name": "x"}, *turns("a", "b")[1:]]
    )
    assert conversation.full_messages is None


@pytest.mark.parametrize("shown", ["(m.tool_calls or [])[:1]", "m.tool_calls or []"])
def test_a_second_equal_call_and_short_arguments_are_found_where_they_are_rendered(tmp_path: Path, shown: str) -> None:
    chat = template(tmp_path, TEXT_CONTENT.replace("m.tool_calls or []", shown))
    calls = [CALL, CALL]
    messages = [*turns("3 true?"), {"role": "assistant", "content": "", "tool_calls": calls}]
    if shown == "m.tool_calls or []":
        assert render(chat, messages)[0].count("CALL") == 2
        return
    with pytest.raises(TemplateError, match="a tool call of turn 1"):
        render(chat, messages)


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("trained", ["all", "last"])
def test_a_tool_call_is_not_followed_by_an_empty_turn(tmp_path: Path, content: str | None, trained: str) -> None:
    chat = template(tmp_path, CALL_THEN_TURN, turns=trained)
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    messages = [*turns("Rain?"), call, {"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]
    texts = [text.replace("⟦", "").replace("⟧", "") for text in render(chat, messages)]
    called = 'CALL weather {"city": "a \\"b\\"", "days": 3}<|im_end|>'
    *first, last = texts
    assert first == (
        [f"<|im_start|>user Rain?<|im_start|>A <think>\n\n</think>\n\n{called}"] if trained == "all" else []
    )
    assert last == (
        f"<|im_start|>user Rain?<|im_start|>A {called}<|im_start|>tool no<|im_start|>A <think>\n\n</think>\n\nNo.<|im_end|>"
    )


@pytest.mark.parametrize("trained", ["all", "last"])
def test_a_turn_that_the_template_renders_as_two_drops_the_record(tmp_path: Path, trained: str) -> None:
    chat = template(tmp_path, CALL_THEN_TURN, turns=trained)
    call = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    messages = [*turns("Rain?"), call, {"role": "tool", "content": "no"}, {"role": "assistant", "content": "No."}]
    with pytest.raises(TemplateError, match="renders turn 1 as several turns") as error:
        render(chat, messages)
    assert error.value.reason == SEVERAL_TURNS


def test_the_reason_is_that_of_the_form_that_comes_closest(tmp_path: Path) -> None:
    """As DeepSeek-V3's: the call is rendered if the content is null, but does not end the turn."""
    ends = "{{ m.content }}{% endif %}<|im_end|>"
    assert ends in NULL_CONTENT
    chat = template(tmp_path, NULL_CONTENT.replace(ends, "{{ m.content }}<|im_end|>{% endif %}"))
    messages = [*turns("Rain?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(TemplateError, match=r"turn 1 does not end with an end-of-turn token.* no --template repairs"):
        render(chat, messages)


@pytest.mark.parametrize("role", ["developer", "tool", "system"])
def test_a_turn_that_the_template_leaves_out_drops_the_record(tmp_path: Path, role: str) -> None:
    chat = template(tmp_path, TURNS.replace("ANSWER", "{{ m.content }}").replace("OTHER", ""))
    messages = [{"role": role, "content": "a"}, *turns("has an a", "a")]  # its text is also found elsewhere
    with pytest.raises(TemplateError, match=rf"the content of turn 0 \({role}\)"):
        render(chat, messages)


def test_the_prompt_is_what_inference_gives_where_the_template_moves_the_system_prompt(tmp_path: Path) -> None:
    chat = template(tmp_path, MOVING)
    messages = turns("7 + 8?", "15", "Double it.", "30", system="Brief.")
    assert render(chat, messages) == [
        "<|im_start|>Brief. 7 + 8?/⟦15<|im_end|>⟧",
        "<|im_start|>7 + 8?/15<|im_end|><|im_start|>Brief. Double it./⟦30<|im_end|>⟧",
    ]
    for found, i in zip(render(chat, messages), (2, 4), strict=True):
        assert found.split("⟦")[0] == chat.render(messages[:i], add_generation_prompt=True)


# As Qwen3: the last answer has an empty reasoning, and tags in earlier ones are cut.
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }} {% if m.role != 'assistant' %}{{ m.content }}{% elif loop.last %}"
    "{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a {% endif %}"
)


def test_two_answers_in_a_row_each_follow_the_prompt_of_inference(tmp_path: Path) -> None:
    chat = template(tmp_path, LAST_THINKS)
    messages = [*turns("7 + 8?", "15"), {"role": "assistant", "content": "That is all."}]
    asked, empty = "<|im_start|>u 7 + 8?<|im_end|><|im_start|>a ", "<think>\n\n</think>\n\n"
    assert render(chat, messages) == [f"{asked}⟦{empty}15<|im_end|>⟧<|im_start|>a ⟦{empty}That is all.<|im_end|>⟧"]
    assert chat.render(messages[:2], add_generation_prompt=True) == f"{asked}{empty}15<|im_end|><|im_start|>a "


def test_thinking_tags_mean_something_to_a_template_that_cuts_them_in_earlier_turns(tmp_path: Path) -> None:
    chat = template(tmp_path, LAST_THINKS)
    first, second = render(chat, turns("7 + 8?", "<think>\nso\n</think>\n\n15", "Double it.", "30"))
    assert "⟦<think>\nso\n</think>\n\n15<|im_end|>⟧" in first and "so" not in second and "<|im_start|>a 15" in second


def test_generation_blocks_say_what_is_trained_on(tmp_path: Path) -> None:
    """The end-of-turn token is trained on even if it stands behind the block."""
    (found,) = render(template(tmp_path, MARKED), turns("7 + 8?", "15", "Double it.", "30"))
    assert found == (
        "<|im_start|>Q 7 + 8?<|im_start|>A ⟦15<|im_end|>⟧<|im_start|>Q Double it.<|im_start|>A ⟦30<|im_end|>⟧"
    )
    partly = MARKED.replace("{% generation %}", "{% generation %}x{% endgeneration %}y{% generation %}")
    (found,) = render(template(tmp_path / "partly", partly), turns("7 + 8?", "15"))
    assert found == "<|im_start|>Q 7 + 8?<|im_start|>A ⟦x⟧y⟦15<|im_end|>⟧"


def test_a_template_that_reads_the_clock_gets_the_date_of_the_settings(tmp_path: Path) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + TURNS.replace("ANSWER", "{{ m.content }}")
    assert render(template(tmp_path, source), turns("Q", "A"))[0].startswith("26 Jul 2024")
    assert render(template(tmp_path, source, date="2025-12-01"), turns("Q", "A"))[0].startswith("01 Dec 2025")
    with pytest.raises(DataError, match="--date yesterday is not a date"):
        Rendering(date="yesterday")


def test_template_options_come_from_the_settings_and_the_record(tmp_path: Path) -> None:
    source = "{{ 'T' if thinking else 'N' }}" + TURNS.replace("ANSWER", "{{ m.content }}")
    chat = template(tmp_path, source, options=(("thinking", "true"),))
    assert render(chat, turns("Q", "A"))[0][0] == "T"
    assert render(chat, turns("Q", "A"), options={"thinking": False})[0][0] == "N"
    with pytest.raises(DataError, match="--template-option thinking=yes is not JSON"):
        Rendering(options=(("thinking", "yes"),))


@pytest.mark.parametrize("flag", ["loss", "loss_mask", "trainable", "train", "weight"])
def test_flags_of_messages_say_what_is_trained_on(tmp_path: Path, flag: str) -> None:
    chat = template(tmp_path, TURNS.replace("ANSWER", "{{ m.content }}"))
    messages = turns("one", "two", "three", "four")
    messages[1][flag] = False if flag != "weight" else 0
    assert render(chat, messages)[0].count("⟦") == 1 and "⟦four<|im_end|>⟧" in render(chat, messages)[0]
    messages[2][flag] = True if flag != "weight" else 1
    assert (
        "⟦three<|im_start|>⟧"
        in render(
            template(tmp_path / "b", chat.source.replace("Q {{ m.content }}", "Q {{ m.content }}<|im_start|>")),
            messages,
        )[0]
    )
    messages[3][flag] = False if flag != "weight" else 0
    messages[2][flag] = None
    with pytest.raises(TemplateError, match="no turn of assistant to train on"):
        render(chat, messages)


def test_flags_that_cannot_be_followed_are_not_ignored() -> None:
    read = MessageReader().read
    with pytest.raises(Dropped, match="training flag is not a number"):
        read([{"role": "user", "content": "a", "train": "no"}])
    with pytest.raises(Dropped, match="trained turn of another role"):
        read([{"role": "tool", "content": "a", "train": True}])
    reader, flags = (
        MessageReader(),
        {"loss_scale": 2, "exclude": True, "supervised": False, "reward": 0.5, "advantage": -1},
    )
    reader.read([{"role": "user", "content": "a", key: value} for key, value in flags.items()])
    assert reader.unreadable == set(flags)
    reader = MessageReader(ignored=["loss_scale"])
    reader.read([{"role": "user", "content": "a", "loss_scale": 2, "timestamp": 3}])
    assert (reader.unused, reader.unreadable) == ({"timestamp"}, set())


def test_sharegpt_and_function_calls_are_read_as_messages() -> None:
    conversation = MessageReader().read(
        [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "No rain.", "weight": 0},
        ],
        tools='[{"name": "weather"}]',
    )
    assert conversation.shape == ("user", "assistant", "tool", "assistant")
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert conversation.tools == [{"name": "weather"}] and conversation.train == (None, None, None, False)


@pytest.mark.parametrize("inline", [False, True])
def test_deepseek_r1_gives_the_generation_prompts_of_the_published_template(tmp_path: Path, inline: bool) -> None:
    directory = tiny.hf_tokenizer(tmp_path, template=None)
    config = (directory / "tokenizer_config.json").read_text().replace("{", '{"bos_token": "<|endoftext|>", ', 1)
    (directory / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(directory)
    published = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    )
    repair = ChatTemplate(tokenizer, "deepseek-r1")
    messages = turns("one", "two", "three", "four", system="Brief.")
    for message in messages[2::2]:
        if inline:
            message["content"] = f"<think>\nso\n</think>\n\n{message['content']}"
        else:
            message["reasoning_content"] = "so"
    tokenizer.chat_template = published
    original = ChatTemplate(tokenizer)
    with pytest.raises(TemplateError, match="takes one system turn"):
        render(repair, [messages[0], *messages])
    trajectories = render(repair, messages)
    assert len(trajectories) == 2
    for trajectory, i in zip(trajectories, (2, 4), strict=True):
        prompt, _, answer = trajectory.partition("⟦")
        assert prompt == original.render(messages[:i], add_generation_prompt=True)
        assert answer == f"so\n</think>\n\n{('two', 'four')[i // 4]}<|im_end|>⟧"


def test_conversations_of_a_shape_share_a_trace(tmp_path: Path) -> None:
    chat = template(tmp_path, OPENING.replace("m.content.split('</think>')[-1]", "m.content"))
    shape = ("user", "assistant", "content", "user", "assistant", "content")
    trajectories = chat.trajectories(Conversation(shape, list("abcdef")))
    assert all(trajectory.frame is not None for trajectory in trajectories)
    assert [marked(t).split("⟦")[1] for t in trajectories] == [
        "b\n</think>\n\nc<|im_end|>⟧",
        "e\n</think>\n\nf<|im_end|>⟧",
    ]
