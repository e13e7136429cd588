"""A chat template with the date and the variables that a corpus was rendered with, for the models that are trained on it.

Without them the prompts of an exported model would have today's date, where a template asks for it, and not the training's.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping

DEFAULT_DATE = "2024-07-26"  # Llama 3.2's template writes this one where it has no clock
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def reads_clock(source: str) -> bool:
    """Whether a template asks for today's date."""
    return "strftime_now" in source


def with_defaults(source: str, *, date: str | None, options: Mapping[str, str]) -> str:
    """The template with `date` for today's, and with `options` (as JSON) for variables that are not given. date: YYYY-MM-DD."""
    if date is not None:
        day = datetime.date.fromisoformat(date)
        source = _CLOCK.sub(lambda found: json.dumps(day.strftime(found[2]), ensure_ascii=False), source)
    # JSON's values in Python's notation are Jinja's too. The line break is removed with the block before it.
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {json.loads(value)!r} %}}{{%- endif %}}"
        for name, value in options.items()
        if name.isidentifier()
    )
    return f"{defaults}\n{source}" if defaults else source
