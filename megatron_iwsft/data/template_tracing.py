"""Plans: what a chat template does to conversations of one shape, found once by rendering probes instead of texts.

Rendering Jinja takes longer than tokenizing. A template that only copies the messages' texts into its frame, though, renders
every conversation of one shape (the roles of its turns) alike. `trace` renders probes that note what the template asks of a
text; a text that gives the same answers can then be put into the frame directly. Whatever a probe cannot follow has no plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

# Nodes and filters that turn a text into another string behind a probe's back.
_HIDING_NODES = (nodes.Concat, nodes.Mod, nodes.AssignBlock, nodes.FilterBlock, nodes.Macro, nodes.CallBlock)
_OPEN_FILTERS = frozenset(
    {"trim", "string", "tojson", "length", "list", "default", "selectattr", "rejectattr", "items"}
)

Pieces = list[tuple[str, bool]]


class Untraceable(Exception):
    """The template looks into a text in a way that a probe cannot follow."""


@dataclass(frozen=True)
class Plan:
    """The frame of one shape of conversation.

    pieces     of each, its text with one %s for each slot, and the numbers of the slots
    trained    of each piece, whether it is trained on
    stripped   slots whose text must not begin or end in whitespace, since the template strips it
    forbidden  (slot, string) pairs: the slot's text must not contain the string, since the template looks for it
    """

    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    trained: tuple[bool, ...]
    stripped: tuple[int, ...]
    forbidden: tuple[tuple[int, str], ...]

    def fill(self, texts: list[str]) -> list[str] | None:
        """The rendered pieces with `texts` in their slots; None if the template has to see these texts itself."""
        for slot in self.stripped:
            if texts[slot].strip() != texts[slot]:
                return None
        for slot, string in self.forbidden:
            if string in texts[slot]:
                return None
        if "" in texts:
            return None
        return [
            frame % texts[slots[0]] if len(slots) == 1 else frame % tuple([texts[s] for s in slots])
            for frame, slots in self.pieces
        ]


def traceable(environment: jinja2.Environment, source: str) -> bool:
    """Whether a template hands texts on only in ways that a probe notices."""
    tree = environment.parse(source)
    if next(tree.find_all(_HIDING_NODES), None) is not None:
        return False
    return all(f.name in _OPEN_FILTERS for f in tree.find_all(nodes.Filter))


def trace(slots: int, render: Callable[[list[Any]], Pieces]) -> Plan | None:
    """The plan of `render`, which takes as many texts as there are slots; None if it has none.

    `render`'s own complaints about the shape are passed on.
    """
    probes = [_Probe.make(i) for i in range(slots)]
    try:
        rendered = render(probes)
    except Untraceable:
        return None
    by_text: dict[str, int] = {}
    for i, probe in enumerate(map(str, probes)):
        by_text |= dict.fromkeys(
            (probe, probe.strip(), probe.lstrip(), probe.rstrip(), probe.strip("\n"), probe.rstrip("\n")), i
        )
    longest_first = sorted(by_text, key=len, reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if slots else re.compile("(?!)")
    pieces = []
    for text, _ in rendered:
        parts = cut.split(text)
        if any(_DIGITS in part for part in parts[::2]):
            return None  # a text was changed on its way
        frame = "%s".join(part.replace("%", "%%") for part in parts[::2])
        pieces.append((frame, tuple(by_text[part] for part in parts[1::2])))
    return Plan(
        pieces=tuple(pieces),
        trained=tuple(trained for _, trained in rendered),
        stripped=tuple(i for i, p in enumerate(probes) if p.stripped),
        forbidden=tuple((i, s) for i, p in enumerate(probes) for s in sorted(p.forbidden)),
    )


# Digits, which survive escaping and folding, and beside them what does not.
_DIGITS = "2718281828459045"
_CORE = f'\ue001"\\<e\u0301\t  Aa%s{_DIGITS}'

# What Python itself needs of an object; everything else that `str` offers would look into the text.
_BLIND = frozenset(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__format__"}


def _refuse(self: Any, *_: Any, **__: Any) -> Any:
    raise Untraceable


class _Opaque(str):
    """A text that can only be joined to others and written out; it is not empty."""

    locals().update({name: _refuse for name in dir(str) if name not in _BLIND})

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(self, other))

    def __radd__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(other, self))


class _Probe(_Opaque):
    """Stands for a message's text and notes what it was asked. Begins and ends in whitespace, so that stripping shows."""

    stripped: bool
    forbidden: set[str]

    @staticmethod
    def make(slot: int) -> _Probe:
        probe = _Probe(f" \n{_CORE}{slot}\ue002\n ")
        probe.stripped, probe.forbidden = False, set()
        return probe

    def _without(self, cut: Callable[[str, str | None], str], chars: str | None) -> _Probe:
        if chars is not None and chars.strip():
            raise Untraceable
        self.stripped = True
        probe = _Probe(cut(self, chars))
        probe.stripped, probe.forbidden = True, self.forbidden
        return probe

    def strip(self, chars: str | None = None) -> _Probe:
        return self._without(str.strip, chars)

    def lstrip(self, chars: str | None = None) -> _Probe:
        return self._without(str.lstrip, chars)

    def rstrip(self, chars: str | None = None) -> _Probe:
        return self._without(str.rstrip, chars)

    def _lacks(self, strings: Any, *_: Any) -> bool:
        for string in strings if isinstance(strings, tuple) else (strings,):
            if type(string) is not str or not string:
                raise Untraceable
            self.forbidden.add(string)
        return False

    __contains__ = startswith = endswith = _lacks

    def __eq__(self, other: object) -> bool:
        return other != "" and isinstance(other, str) and self._lacks(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _refuse
