"""Published tokenizers and templates: training text compared with `apply_chat_template`."""

from __future__ import annotations

import pytest

from tests.support import real

pytestmark = [pytest.mark.real, pytest.mark.slow]

TOOLS = {"a tool call", "a tool call with its result"}
CASES = {  # tokenizer, template of ours → the conversations that are dropped, and the number of trajectories
    ("qwen2_5", None): (set(), 10),
    ("qwen3", None): (set(), 15),
    ("mistral_nemo", None): (set(), 11),
    ("llama3_2", None): (set(), 10),
    ("deepseek_v3", None): (TOOLS, 8),  # writes no end-of-turn token after a single tool call
    ("gemma3", None): (TOOLS, 8),
    ("deepseek_v3", "deepseek-r1"): (TOOLS, 12),
    ("SmolLM2-135M-Instruct", None): (TOOLS, 8),
}


@pytest.mark.parametrize(("name", "template"), CASES, ids=str)
def test_training_text_is_that_of_apply_chat_template(name: str, template: str | None) -> None:
    directory = real.smollm2() if name.startswith("SmolLM2") else real.tokenizer(name)
    row = real.bench("templates").compare(name, directory, template)
    dropped, trajectories = CASES[name, template]
    assert set(row.dropped) == dropped, row.dropped
    assert row.trajectories == trajectories
    assert row.ids_equal == row.masks_equal == row.prompts_equal == row.trajectories
