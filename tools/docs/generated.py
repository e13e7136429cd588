"""The generated parts of the site, each from the code that it documents: config fields, commands, metrics, error messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from html import escape
from typing import Any

import messages

from megatron_iwsft.cli.main import COMMANDS, command_parser
from megatron_iwsft.config.describe import default_of, fields, section_of, type_of
from megatron_iwsft.config.schema import Config
from megatron_iwsft.objectives.metrics import METRICS, Metric

# `example:` in a command's docstring, with or without more words, and the indented lines after it.
EXAMPLE = re.compile(r"^examples?\b.*:\n((?:  .*(?:\n|\Z))+)", re.MULTILINE)


def config() -> str:
    """A heading per section and per field, with type, default and the field's docstring."""
    out = []
    for key, field in fields(Config):
        section = section_of(field)
        documentation = field.description or (section and section.__doc__) or ""
        level = "##" if section is not None and "." not in key else "###"
        out += [f"{level} `{key}` {{ #{key} }}", ""]
        if section is None:
            out += [f"`{type_of(field)}` · `{default_of(field)}`", ""]
        out += [_paragraphs(documentation), ""]
    return "\n".join(out)


def commands() -> str:
    """A heading per command: purpose and examples as `--help` has them, and a table of its options."""
    out = ["| command | does |", "|---|---|"]
    out += [f"| [`iwsft {name}`](#{name}) | {_cell(summary)} |" for name, (_, summary) in COMMANDS.items()]
    for name in COMMANDS:
        parser = command_parser(name)
        description = (parser.description or "").strip()
        examples = "\n\n".join(EXAMPLE.findall(description))
        code = "\n".join(line.removeprefix("  ") for line in examples.strip().splitlines())
        out += ["", f"## iwsft {name} {{ #{name} }}", "", _paragraphs(EXAMPLE.sub("", description)), ""]
        out += ["```bash", code, "```", ""]
        out += ["| option | default | |", "|---|---|---|"]
        out += [_option(action) for action in parser._actions if action.dest != "help"]
    return "\n".join(out)


def _option(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = action.metavar or (action.dest.upper() if action.option_strings and action.nargs != 0 else "")
    if action.choices and action.option_strings:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    shown = f"{name} {value}" if action.option_strings and value else name
    default = "required" if action.required and action.option_strings else action.default
    empty = default in (None, False) or default == [] or default is argparse.SUPPRESS
    return f"| `{_cell(shown)}` | {'' if empty else f'`{_cell(str(default))}`'} | {_cell(escape(action.help or '', quote=False))} |"


_NEEDS = {
    None: "always",
    "weights": "an objective with weights",
    "reference": "an objective with a reference",
    "reference_samples": "`data.drawn_from: reference_filtered` or `reference`, in the first epoch, if no trajectory is in it twice, "
    "without `reference.refresh`",
    "all_samples": "the same with `data.drawn_from: reference`, quality mode `none` or `weight`",
}


def metrics() -> str:
    out = ["| metric | what | computed as | defined for |", "|---|---|---|---|"]
    for metric in METRICS:
        out.append(f"| `{metric.name}` | {_cell(metric.title)} | {_cell(_computed(metric))} | {_NEEDS[metric.needs]} |")
    return "\n".join(out)


def _computed(metric: Metric) -> str:
    if metric.measured:
        return "measured by the trainer"
    if metric.derived is not None:
        return "derived from several sums"
    return f"Σ `{metric.numerator}` / Σ `{metric.denominator}`" if metric.denominator else f"Σ `{metric.numerator}`"


def errors() -> str:
    """Every message by its text, grouped by kind, with the file that raises it."""
    found: dict[str, dict[str, set[str]]] = {}
    for message in messages.messages():
        if re.search(r"[A-Za-z]{2,}", message.text):  # others pass on a complete message
            found.setdefault(message.kind, {}).setdefault(message.text, set()).add(message.path)
    out = []
    for kind in sorted(found):
        out += [f"## {kind}", "", "| message | raised in |", "|---|---|"]
        for text in sorted(found[kind], key=lambda text: text.lstrip(f"{messages.HOLE}: ").lower()):
            where = ", ".join(f"`{path.removeprefix('megatron_iwsft/')}`" for path in sorted(found[kind][text]))
            out.append(f"| {_cell(escape(text, quote=False))} | {where} |")
        out.append("")
    return "\n".join(out)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _paragraphs(text: str) -> str:
    """A docstring as Markdown: blank lines separate paragraphs; what is indented is code."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        indented = all(line.startswith("  ") for line in paragraph.splitlines())
        out.append(f"```text\n{paragraph}\n```" if indented else escape(paragraph, quote=False).replace("*", "\\*"))
    return "\n\n".join(out)


PARTS: dict[str, Callable[[], Any]] = {"config": config, "commands": commands, "metrics": metrics, "errors": errors}
