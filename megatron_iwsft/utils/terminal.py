"""Text of unknown origin on the terminal."""

from __future__ import annotations

import re

# Control characters except tab and newline, controls of writing direction, and unpaired surrogates (from file names).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` with its control characters escaped, as \x1b: a terminal would execute them."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
