"""Progress of long work: a bar in a terminal; elsewhere, as in a batch job's log, a line every half minute."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from megatron_iwsft.utils.text import tell

_LINE_EVERY_S = 30.0


def progress(
    items: Iterable | None, what: str, *, unit: str, total: int | None = None, done: int = 0, shown: bool = True
) -> tqdm:
    """`items` with their progress on standard error; without items, a context manager with `update(n)`, for `total` units."""
    settings: dict[str, Any] = {"desc": what, "unit": f" {unit}", "total": total, "initial": done, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(items, **settings)
    every = {"mininterval": _LINE_EVERY_S, "delay": _LINE_EVERY_S, "miniters": 1, "leave": False}
    return _Lines(items, file=io.StringIO(), **every, **settings)


class _Lines(tqdm):
    """A line of its own each time that tqdm would redraw its bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # otherwise the bar is being cleared
            done, elapsed = self.n - self.initial, self.format_dict["elapsed"]
            left = f", {self.format_interval((self.total - self.n) * elapsed / done)} left" if done else ""
            tell(f"{self.desc}: {self.n:,} of {self.total:,}{self.unit}{left}", error=True)
        return True
