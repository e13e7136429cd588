"""Every message of a user's mistake names the thing, the place and the way out, in plain words. They are read from the source."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from types import ModuleType

import pytest

from tests.support import ROOT


def load(name: str) -> ModuleType:
    """A module of tools/docs."""
    spec = importlib.util.spec_from_file_location(f"tools_docs_{name}", ROOT / "tools" / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


catalogue = load("messages")
# A message whose text another function makes: the holes say nothing about it here.
MESSAGES = [m for m in catalogue.messages() if len(re.findall(r"[A-Za-z]{2,}", m.text)) > 2]

# What to do: an instruction, or what would have been accepted.
INSTRUCTION = re.compile(
    r"(?:^|[.:;,…)] |\b(?:or|and|then|not) )(?:to \w+ \w+, )?"
    r"(?:add|allow|change|append|check|choose|continue|convert|copy|correct|create|download|export|fix|free|give|increase|install|keep|leave|list|lower|make|merge|move|"
    r"name|pass|put|raise|rebuild|recompute|remove|rename|repair|repeat|replace|restore|return|run|save|set|shard|start|submit|take|unset|"
    r"use|write)\b",
    re.IGNORECASE,
)
ACCEPTED = re.compile(
    r"\bmust\b|\bexpected\b|[Ss]upported(?: are|:)|known: |\btakes\b|\bcan be\b|of the form|\bneeds? |pip install|Did you mean|See `|"
    r"chmod|goes? with|\bis for\b|between .* and|tasks are numbered"
)
# The left column of the house's style.
PICTURESQUE = re.compile(
    r"\b(?:whole|mended|goes on|went on|lies in|stands in|of one's own|for want of|without a word|is told|makes? of it|ignores none|"
    r"as good as none|whatever else)\b|\b(?:FLOPs|tokens|process) a (?:GPU|second|core)\b",
    re.IGNORECASE,
)
THING = re.compile(r"[`'\"]|--\w|\w\.\w|\w_\w|…|[A-Z]{2,}")


# Holes that are filled with a sentence of advice, or with a complete complaint.
ADVICE = re.compile(r"advice|again|hint|how_to|found\[0\]|complaint|missing_directory|self\.failures")


def problems(text: str, holes: tuple[str, ...] = ()) -> list[str]:
    found = []
    advised = any(ADVICE.search(hole) for hole in holes)
    if not THING.search(text):
        found.append("names neither a thing nor a place")
    if not advised and not INSTRUCTION.search(text) and not ACCEPTED.search(text):
        found.append("has no way out")
    if PICTURESQUE.search(text):
        found.append(f"says {PICTURESQUE.search(text)[0]!r}")
    if "…" not in text and "--" not in text and len(text.split()) < 5:
        found.append("is too short to say what, where and what to do")
    if not re.search(r"[.?…)\]'\"]$|-\w \S+$|\w+\(.*\)$", text):
        found.append("does not end as a sentence or a command")
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: f"{m.path}:{m.line}")
def test_a_message_says_what_where_and_what_to_do(message) -> None:
    assert not problems(message.text, message.holes), f"{message.path}:{message.line}: {message.text!r}"


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 250
    assert any(m.path.startswith("megatron_iwsft/config/evaluation") for m in MESSAGES)  # of validators
    assert {m.kind for m in MESSAGES} == {"ConfigError", "DataError", "CheckpointError", "DivergenceError"}


@pytest.mark.parametrize(
    "text",
    [
        "it failed",
        "the corpus is wrong.",
        "… is damaged.",
        "the whole checkpoint … is gone. Remove it.",
        "… goes on without a word. Use another.",
        "could not be read",
    ],
)
def test_a_bad_message_is_found(text: str) -> None:
    assert problems(text)


def test_text_is_followed_through_constants_and_alternatives() -> None:
    source = """ADVICE = 'Run it again.'
def f(x):
    hint = 'Use ' + x if x else 'Remove it.'
    raise DataError(f'{x} is bad. {ADVICE} {hint}')"""
    tree = ast.parse(source)
    ((function, node),) = catalogue._raises(tree)
    names = catalogue._constants(tree) | catalogue._locals(function)
    assert catalogue._text(node.exc.args[0], names, []) == "… is bad. Run it again. Use …"
