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
    settings: dict[str, Any] = {"iterable": items, "total": total, "initial": done, "disable": not shown}
    settings |= {"desc": what, "unit": f" {unit}"}
    if sys.stderr.isatty():
        return tqdm(**settings)
    settings |= {"mininterval": _LINE_EVERY_S, "delay": _LINE_EVERY_S, "miniters": 1, "leave": False}
    return _Lines(file=io.StringIO(), **settings)


class _Lines(tqdm):
    """A line of its own each time that tqdm would redraw its bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # otherwise the bar is being cleared
            done, elapsed, total = self.n - self.initial, self.format_dict["elapsed"], self.total or self.n
            left = f", {self.format_interval((total - self.n) * elapsed / done)} left" if done else ""
            tell(f"{self.desc}: {self.n:,} of {total:,}{self.unit}{left}", error=True)
