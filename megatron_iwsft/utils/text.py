"""Text from elsewhere, made safe to show: without control characters and terminal escape sequences."""

from __future__ import annotations

import sys
import threading
import unicodedata

LOADING = "loading torch and Megatron-Core, which takes some seconds"

_KEPT = "\n\t"
# Unicode categories: control characters, surrogates, and separators that break lines.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
# Other format characters are part of words in some scripts; these reverse or hide text.
_DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"


def say(text: str, *, error: bool = False) -> None:
    """Print `printable(text)`, on standard error if `error`. Everything that a command says goes through here, or through `tell`."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def tell(text: str, *, error: bool = False) -> None:
    """`say`, in a job that continues where its log is on a full disk, or its terminal has gone: it has logs/events.jsonl.

    A reader that has left the output ends the job, but none of its threads, which must do what they said.
    """
    try:
        say(text, error=error)
    except BrokenPipeError:
        if threading.current_thread() is threading.main_thread():
            raise
    except OSError:
        pass


def printable(text: str) -> str:
    r"""`text` with control characters, escape sequences, surrogates and direction marks written as \x1b; line breaks and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join((f"\\x{ord(c):02x}" if ord(c) < 256 else _unicode_escape(c)) if _is_escaped(c) else c for c in text)


def printable_line(text: str) -> str:
    """`printable` for names and table cells: line breaks and tabs are escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def printable_json(text: str) -> str:
    """A JSON document in which `printable` would find nothing to escape, and which means the same."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_unicode_escape(c) if _is_escaped(c) else c for c in text)


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD for surrogates: what stands for bytes that are no text, or came out of JSON alone. No tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_escaped(character: str) -> bool:
    if character in _KEPT:
        return False
    return character in _DIRECTION or unicodedata.category(character) in _ESCAPED


def _unicode_escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
