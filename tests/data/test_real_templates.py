"""Published tokenizers and templates: training text compared with `apply_chat_template`."""

from __future__ import annotations

import pytest

from tests.support import real

pytestmark = [pytest.mark.real, pytest.mark.slow]

TOOLS = {"a tool call", "a tool call with its result"}
CASES = {  # tokenizer, template of ours → the conversations that are dropped
    ("qwen2_5", None): set(),
    ("qwen3", None): set(),
    ("mistral_nemo", None): set(),
    ("llama3_2", None): set(),
    ("deepseek_v3", None): TOOLS,  # writes no end-of-turn token after a single tool call
    ("gemma3", None): TOOLS,
    ("deepseek_v3", "deepseek-r1"): TOOLS,
    ("SmolLM2-135M-Instruct", None): TOOLS,
}


@pytest.mark.parametrize(("name", "template"), CASES, ids=str)
def test_training_text_is_that_of_apply_chat_template(name: str, template: str | None) -> None:
    directory = real.smollm2() if name.startswith("SmolLM2") else real.tokenizer(name)
    row = real.bench("templates").compare(name, directory, template)
    assert set(row.dropped) == CASES[name, template], row.dropped
    assert row.trajectories >= row.kept > 7
    assert row.ids_equal == row.masks_equal == row.prompts_equal == row.trajectories
