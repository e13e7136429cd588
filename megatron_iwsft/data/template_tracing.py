"""Trace a chat template once per conversation shape, so that most conversations are rendered without running Jinja.

Rendering Jinja takes longer than tokenizing. But a template that only copies the messages' texts renders all conversations of
one shape (the roles of the turns) in the same way: a fixed frame with slots for the texts. `trace` renders probe strings, which
record what the template asks about a text. A text that gives the same answers as the probe can be put into the frame
directly. If the template does anything that a probe cannot record, the shape has no frame and is rendered by Jinja.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes

# Syntax that can turn a text into another string without the probe noticing, and filters that cannot.
_UNTRACEABLE_NODES = (nodes.Concat, nodes.Mod, nodes.AssignBlock, nodes.FilterBlock, nodes.Macro, nodes.CallBlock)
_TRACEABLE_FILTERS = frozenset(
    {"trim", "string", "tojson", "length", "list", "default", "selectattr", "rejectattr", "items"}
)

# (text, index of the message that it trains or None) for each piece of a rendered trajectory
Pieces = list[tuple[str, int | None]]


class Untraceable(Exception):
    """The template inspects a text in a way that a probe cannot record."""


@dataclass(frozen=True)
class TracedFrame:
    """A trajectory of all conversations of one shape: fixed text with slots for the messages' texts.

    pieces  for each piece, its format string with one %s per slot, and the slots' indices
    turns   for each piece, the index of the message that it trains, or None
    """

    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    turns: tuple[int | None, ...]

    @cached_property
    def trained(self) -> list[bool]:
        """Whether each piece is trained on."""
        return [turn is not None for turn in self.turns]

    def fill(self, texts: list[str]) -> list[str]:
        """The rendered pieces with `texts` in their slots."""
        return [
            piece % texts[slots[0]] if len(slots) == 1 else piece % tuple([texts[s] for s in slots])
            for piece, slots in self.pieces
        ]


@dataclass(frozen=True)
class Trace:
    """The rendering of all conversations of one shape, as one frame for each trajectory.

    stripped   slots that the template strips: their text must not begin or end with whitespace
    forbidden  (slot, string) pairs: the template searches the slot's text for the string, so the text must not contain it
    """

    frames: tuple[TracedFrame, ...]
    stripped: tuple[int, ...]
    forbidden: tuple[tuple[int, str], ...]

    def accepts(self, texts: list[str]) -> bool:
        """Whether the frames render these texts as the template does."""
        for slot in self.stripped:
            if texts[slot].strip() != texts[slot]:
                return False
        for slot, string in self.forbidden:
            if string in texts[slot]:
                return False
        return "" not in texts

    def complete(self, shape: Sequence[str]) -> bool:
        """Whether every frame shows the content of each turn up to its last trained one, and the reasoning of each trained turn."""
        for frame in self.frames:
            trained = {turn for turn in frame.turns if turn is not None}
            shown = {slot for _, slots in frame.pieces for slot in slots}
            turn = -1
            for slot, kind in enumerate(shape):
                turn += kind != "content"
                is_reasoning = kind != "content" and shape[slot + 1 : slot + 2] == ("content",)
                wanted = turn in trained if is_reasoning else turn <= max(trained)
                if wanted and slot not in shown:
                    return False
        return True


def traceable(environment: jinja2.Environment, source: str) -> bool:
    """Whether a template uses only syntax and filters whose effect on a text a probe can record."""
    tree = environment.parse(source)
    if next(tree.find_all(_UNTRACEABLE_NODES), None) is not None:
        return False
    return all(f.name in _TRACEABLE_FILTERS for f in tree.find_all(nodes.Filter))


def trace(slots: int, render: Callable[[list[Any]], list[Pieces]]) -> Trace | None:
    """The trace of `render`, a function of `slots` texts; None if it cannot be traced.

    Exceptions of `render` other than Untraceable are passed on.
    """
    probes = [_Probe.for_slot(i) for i in range(slots)]
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
    frames = []
    for trajectory in rendered:
        pieces = []
        for text, _ in trajectory:
            parts = cut.split(text)
            if any(_DIGITS in part for part in parts[::2]):
                return None  # the template changed a text
            piece = "%s".join(part.replace("%", "%%") for part in parts[::2])
            pieces.append((piece, tuple(by_text[part] for part in parts[1::2])))
        frames.append(TracedFrame(tuple(pieces), tuple(turn for _, turn in trajectory)))
    return Trace(
        frames=tuple(frames),
        stripped=tuple(i for i, p in enumerate(probes) if p.stripped),
        forbidden=tuple((i, s) for i, p in enumerate(probes) for s in sorted(p.forbidden)),
    )


# A probe's text contains digits, which escaping and case folding leave unchanged, and characters that they change.
_DIGITS = "2718281828459045"
_PROBE_TEXT = f'\ue001"\\<e\u0301\t  Aa%s{_DIGITS}'

# Methods that every Python object needs. All other methods of `str` would inspect the text.
_INSPECTING = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __format__"
_ALLOWED_METHODS = frozenset(dir(object)) - set(_INSPECTING.split())


def _raise_untraceable(self: Any, *_: Any, **__: Any) -> Any:
    raise Untraceable


class _Opaque(str):
    """A non-empty text that can only be concatenated and written out."""

    locals().update({name: _raise_untraceable for name in dir(str) if name not in _ALLOWED_METHODS})

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(self, other))

    def __radd__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(other, self))


class _Probe(_Opaque):
    """Placeholder for a message's text that records what it was asked. Has whitespace at both ends, to detect stripping."""

    stripped: bool
    forbidden: set[str]

    @staticmethod
    def for_slot(slot: int) -> _Probe:
        probe = _Probe(f" \n{_PROBE_TEXT}{slot}\ue002\n ")
        probe.stripped, probe.forbidden = False, set()
        return probe

    def _strip(self, strip: Callable[[str, str | None], str], chars: str | None) -> _Probe:
        if chars is not None and chars.strip():
            raise Untraceable
        self.stripped = True
        probe = _Probe(strip(self, chars))
        probe.stripped, probe.forbidden = True, self.forbidden
        return probe

    def strip(self, chars: str | None = None) -> _Probe:
        return self._strip(str.strip, chars)

    def lstrip(self, chars: str | None = None) -> _Probe:
        return self._strip(str.lstrip, chars)

    def rstrip(self, chars: str | None = None) -> _Probe:
        return self._strip(str.rstrip, chars)

    def _record_search(self, strings: Any, *_: Any) -> bool:
        for string in strings if isinstance(strings, tuple) else (strings,):
            if type(string) is not str or not string:
                raise Untraceable
            self.forbidden.add(string)
        return False

    __contains__ = startswith = endswith = _record_search

    def __eq__(self, other: object) -> bool:
        return other != "" and isinstance(other, str) and self._record_search(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _raise_untraceable
