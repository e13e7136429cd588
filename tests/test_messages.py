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
MESSAGES = list(catalogue.messages())
# Where a complete message, made and checked elsewhere, is passed on.
PASSED_ON = {
    "megatron_iwsft/checkpoint/load.py": "_refuse",
    "megatron_iwsft/config/loader.py": "_parse",
    "megatron_iwsft/convert/export.py": "export_running",
    "megatron_iwsft/hf/transformers_models.py": "__init__",
    "megatron_iwsft/train/setup.py": "raise_together",
    "megatron_iwsft/utils/cli.py": "_run",
    "megatron_iwsft/utils/user_code.py": "_load",
}

# What to do: an instruction, or what would have been accepted.
INSTRUCTION = re.compile(
    r"(?:^|[.:;,…)] |\b(?:or|and|then|not) )(?:to \w+ \w+, )?"
    r"(?:add|allow|change|append|check|choose|continue|convert|copy|correct|create|download|export|fix|free|give|increase|install|keep|leave|list|lower|make|merge|move|"
    r"name|pass|put|raise|rebuild|recompute|remove|rename|repair|repeat|replace|restore|return|run|save|set|shard|start|submit|take|unset|"
    r"use|write) (?!and\b|or\b)[\w`…'\"{-]",  # with an object
    re.IGNORECASE,
)
ACCEPTED = re.compile(
    r"\bmust\b|\bexpected\b|[Ss]upported(?: are|:)|known: |\btakes\b|\bcan be\b|of the form|\bneeds? |pip install|Did you mean|See `|"
    r"chmod|goes? with|\bis for\b|between .* and|tasks are numbered|(?:Commands|Sections|Metrics of this run): "
)
# The left column of the house's style.
PICTURESQUE = re.compile(
    r"\b(?:whole|mended|goes on|went on|lies in|stands in|of one's own|for want of|without a word|is told|makes? of it|ignores none|"
    r"as good as none|whatever else)\b|\b(?:FLOPs|tokens|process) a (?:GPU|second|core)\b",
    re.IGNORECASE,
)
THING = re.compile(r"[`'\"]|--\w|\w\.\w|\w_\w|…|[A-Z]{2,}")


# Holes that are filled with a sentence of advice, or with a complete complaint.
ADVICE = re.compile(r"\w*_?(?:advice|again|hint|how_to)|complaints?(?:\[0\])?")


def problems(text: str, holes: tuple[str, ...] = ()) -> list[str]:
    found = []
    advised = any(ADVICE.fullmatch(hole) for hole in holes)
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
    if PASSED_ON.get(message.path) == message.function and message.text.startswith(catalogue.HOLE):
        return
    assert not problems(message.text, message.holes), f"{message.path}:{message.line}: {message.text!r}"


def test_advice_for_another_message_says_what_to_do() -> None:
    advice = list(catalogue.advice())
    assert len(advice) > 6
    assert not [(place, text) for place, text in advice if problems(f"`x` is damaged. {text}")]


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 500
    made = {(m.path, m.function) for m in MESSAGES}
    assert made >= set(PASSED_ON.items())
    assert ("megatron_iwsft/hf/safetensors.py", "_damaged") in made  # returned, and raised elsewhere
    assert any("Check the path, its permissions and the disk's space." in m.text for m in MESSAGES)  # of any OSError
    assert any(
        "is in use by another job" in m.text for m in MESSAGES
    )  # in a function with the error class as a parameter
    assert any("does not divide the model's" in m.text for m in MESSAGES)  # text from another function
    assert {
        m.text for m in MESSAGES if (m.path, m.function) == ("megatron_iwsft/report/run_record.py", "read_metrics")
    } > {
        "… is damaged: …. Restore it from a copy, or leave the run out.",
        "… is empty: the run has not finished a step. Run this again once it has.",
    }
    assert any(m.path.startswith("megatron_iwsft/config/evaluation") for m in MESSAGES)  # of validators
    assert {m.kind for m in MESSAGES} == {"ConfigError", "DataError", "CheckpointError", "DivergenceError", "UserError"}


@pytest.mark.parametrize(
    "text",
    [
        "it failed",
        "the corpus is wrong.",
        "… is damaged.",
        "the whole checkpoint … is gone. Remove it.",
        "… goes on without a word. Use another.",
        "could not be read",
        "The file x.y is bad, and set.",
        "The file x.y was read, or write.",
    ],
)
def test_a_bad_message_is_found(text: str) -> None:
    assert problems(text)


def test_text_is_followed_through_constants_and_alternatives() -> None:
    source = """ADVICE = 'Run it again.'
def f(x):
    hint = 'Use ' + x if x else 'Remove it.'
    raise DataError(f'{x} is bad. {ADVICE} {hint}{more(x)}')
def more(x) -> str | None:
    return x and None if x else ' It is large.'"""
    tree = ast.parse(source)
    ((function, call),) = [found for found in catalogue._errors(tree) if found[1].func.id == "DataError"]
    scope = catalogue.Scope(
        catalogue._constants(tree) | catalogue._locals(function), catalogue._functions_of(iter([tree]))
    )
    texts = [text for text, _ in catalogue._texts(call.args[0], scope)]
    assert (
        "… is bad. Run it again. Remove it. It is large." in texts
        and "… is bad. Run it again. Use … It is large." in texts
    )


def quoted_messages() -> list[str]:
    """What docs/troubleshooting.md quotes in its column "you see"."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    seen = [row.split("|")[1] for row in page.splitlines() if row.startswith("| ")]
    return [quote for cell in seen for quote in re.findall("`([^`]* [^`]*)`", cell)]


@pytest.mark.parametrize("quote", quoted_messages())
def test_troubleshooting_quotes_a_message(quote: str) -> None:
    wanted = re.compile(".*".join(re.escape(part.strip()) for part in quote.split("…")))
    assert any(wanted.search(message.text) for message in MESSAGES)
