"""Lists in docstrings: aligned lines of a name and its meaning become a Markdown list. An extension of mkdocstrings' Python handler."""

from __future__ import annotations

import re
from typing import Any

import griffe

# "name  meaning" at the start of a line, or a line that continues it.
ITEM = re.compile(r"(?P<name>\w[\w, ]*?)(?: {2,}|: )(?P<meaning>\S.*)|\s+(?P<more>\S.*)")


class ParameterLists(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(as_list, re.split(r"\n\s*\n", obj.docstring.value)))


def as_list(paragraph: str) -> str:
    """The paragraph, as a list if two or more of its lines are aligned `name  meaning` pairs and the others continue them."""
    found = [ITEM.fullmatch(line) for line in paragraph.splitlines()]
    if sum(bool(re.match(r"\w[\w, ]*? {2,}\S", line)) for line in paragraph.splitlines()) < 2 or not all(found):
        return paragraph
    items: list[str] = []
    for match in found:
        assert match
        if match["more"] and items:
            items[-1] += f" {match['more']}"
        else:
            items.append(f"- `{match['name']}`: {match['meaning'] or match['more']}")
    return "\n".join(items)
