"""Loss masks compared with golden renderings, and traced frames with the template itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.data.chat_template import ChatTemplate, Rendering, Trajectory
from megatron_iwsft.data.conversation import Conversation
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.inspect import runs
from megatron_iwsft.data.prepare.records import RecordFormat
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.data.template_engine import TemplateError
from megatron_iwsft.data.template_presets import PRESETS
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.errors import DataError
from tests.support import tiny

# Templates modelled on public ones. They differ in what they inspect, and so in whether they can be traced.
NO_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
TRIMMING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Renders reasoning itself, also if it is inside the content; drops the reasoning of earlier turns.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set content = m.content %}{% set reasoning = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and reasoning %}<think>\n{{ reasoning.strip('\n') }}\n</think>\n\n{% endif %}{{ content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": PRESETS["chatml"],
    "no_prompt": NO_PROMPT,
    "trimming": TRIMMING,
    "thinking": THINKING,
    "tools": TOOLS,
}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "masks.json").read_text(encoding="utf-8"))


def marked(corpus: Corpus, i: int = 0) -> str:
    """The text of a trajectory with ⟦ ⟧ around the trained parts."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in runs(corpus, i))


def shard_one(tmp_path: Path, record: dict, template: str, rendering: Rendering, **fields) -> Corpus:
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", template=template)
    source = tiny.write_jsonl(tmp_path / "records.jsonl", [record])
    settings = ShardSettings(str(tokenizer), record=RecordFormat(rendering=rendering, **fields))
    shard_corpus([source], tmp_path / "corpus", settings, show_progress=False)
    return Corpus.open(tmp_path / "corpus")


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_masks_equal_the_golden_file(tmp_path: Path, case: dict) -> None:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.get("rendering", {}).items()}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in case.get("fields", {}).items()}
    corpus = shard_one(tmp_path, case["record"], TEMPLATES[case["template"]], Rendering(**options), **fields)
    assert marked(corpus) == case["expected"]


def test_no_token_spans_prompt_and_response(tmp_path: Path) -> None:
    """Tries text that would merge into one token: a combining accent, a zero-width joiner, half of an emoji sequence."""
    from tokenizers import Tokenizer

    for k, (prompt, response) in enumerate(
        [("e", "\u0301 ok"), ("👨\u200d", "👩 ok"), ("12", "0 km"), ("\n", "\n ok")]
    ):
        directory = tmp_path / str(k)
        corpus = shard_one(
            directory, {"prompt": "x" + prompt, "response": response}, "{% for m in messages %}{{ m.content }}"
            "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}", Rendering()
        )  # fmt: skip
        own = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
        expected = [own.encode(text, add_special_tokens=False).ids for text in ("x" + prompt, response + "<|im_end|>")]
        assert corpus.tokens(0).tolist() == expected[0] + expected[1]
        assert corpus.mask(0).tolist() == [0] * len(expected[0]) + [1] * len(expected[1])


TEXTS = [" padded ", "plain", "two\nlines\n", "100 %s of {{ x }}", "", "<think>\na\n</think>\n\nb", "é\u0301 <b>\"'&\\"]


@pytest.mark.parametrize("name", ["chatml", "no_prompt", "trimming", "thinking"])
def test_a_traced_frame_renders_the_same_as_the_template(tmp_path: Path, name: str) -> None:
    template = ChatTemplate(load_tokenizer(tiny.hf_tokenizer(tmp_path, template=TEMPLATES[name])))
    rng = np.random.default_rng(0)
    by_frame = 0
    for _ in range(300):
        turns = int(rng.integers(1, 3))
        shape = tuple(["system"][: rng.integers(0, 2)]) + ("user", "assistant") * turns
        if rng.random() < 0.3 and name != "no_prompt":
            shape += ("content",)
        conversation = Conversation(shape, [str(rng.choice(TEXTS)) for _ in shape])
        try:
            expected = template.render_trajectories(conversation)
        except TemplateError as error:
            expected = str(error)
        try:
            trajectories = template.trajectories(conversation)
            found = [[(t, turn) for t, turn in zip(x.texts, x.turns, strict=True) if t] for x in trajectories]
            by_frame += trajectories[0].frame is not None
        except TemplateError as error:
            found = str(error)
        assert found == expected
    assert by_frame > 20


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ ('a' ~ m.content) | trim }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content.replace('a', 'b') }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content[:5] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content if m.content | length > 3 else 'x' }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ '%s' | format(m.content) }}<|im_end|>{% endfor %}",
        "{% macro show(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ show(m.content) | trim }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ {'a': 1}.get(m.content, m.content) }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_inspects_the_texts_is_not_traced(tmp_path: Path, template: str) -> None:
    t = ChatTemplate(load_tokenizer(tiny.hf_tokenizer(tmp_path, template=template)))
    try:
        (trajectory,) = t.trajectories(Conversation(("user", "assistant"), ["a question", "an answer"]))
    except TemplateError:
        return  # the template changes the answer, so it has no position in the rendered text
    assert trajectory.frame is None


def trained(trajectory: Trajectory) -> list[str]:
    return [text for text, turn in zip(trajectory.texts, trajectory.turns, strict=True) if turn is not None]


def test_a_template_that_drops_earlier_reasoning_gives_a_trajectory_for_each_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.hf_tokenizer(tmp_path, template=THINKING))
    conversation = Conversation(("user", "assistant", "content") * 2, ["Q", "hm", "A", "Q2", "hmm", "A2"])
    first, second = ChatTemplate(tokenizer).trajectories(conversation)
    assert trained(first) == ["<think>\nhm\n</think>\n\nA<|im_end|>"]
    assert trained(second) == ["<think>\nhmm\n</think>\n\nA2<|im_end|>"]
    assert "hm\n" not in second.texts[0]
    (last,) = ChatTemplate(tokenizer, rendering=Rendering(turns="last")).trajectories(conversation)
    assert last.texts == second.texts


def test_tool_and_system_turns_cannot_be_trained_on() -> None:
    for role in ("system", "tool", "developer"):
        with pytest.raises(DataError, match="--train-role takes assistant and user"):
            Rendering(roles=("assistant", role))
