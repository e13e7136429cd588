"""Text from elsewhere is shown escaped, and there is one way to show it."""

from __future__ import annotations

import ast
import json

import pytest

from megatron_iwsft.utils.text import printable, printable_json, printable_line, say
from tests.support import ROOT

HOSTILE = "\x1b[2J\x07\r\x00\x7f\x9b\u2028\u202e\udc80"

# Modules that print by themselves, and why.
PRINTS = {
    "utils/text.py": "it is what the others use",
    "cli/completion.py": "a script for the shell",
    "cli/config.py": "its output is read by scripts: values as they are",
    "cli/generate.py": "parts of lines as they are generated, escaped",
    "cli/inspect.py": "colours; its text is escaped before they are added",
}


def test_control_characters_are_escaped() -> None:
    assert printable("a\tb\n→ é 列 👨‍👩‍👧") == "a\tb\n→ é 列 👨‍👩‍👧"
    assert printable(HOSTILE) == "\\x1b[2J\\x07\\x0d\\x00\\x7f\\x9b\\u2028\\u202e\\udc80"
    assert printable_line("a\nb\tc") == "a\\nb\\tc"


@pytest.mark.parametrize("value", [HOSTILE, {HOSTILE: [HOSTILE]}, "\\" + HOSTILE + "\\u001b", "é\n\t列", [], 1.5])
def test_json_keeps_its_meaning(value: object) -> None:
    text = printable_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert printable(text) == text


def test_what_is_said_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say("file \x1b[2J")
    say("error \x9b", error=True)
    assert capsys.readouterr() == ("file \\x1b[2J\n", "error \\x9b\n")


def test_commands_say_things_in_one_way() -> None:
    found = set()
    for path in (ROOT / "megatron_iwsft").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            found.add(path.relative_to(ROOT / "megatron_iwsft").as_posix())
    assert found == set(PRINTS), "use utils.text.say: what is printed may contain names and texts of other people"
