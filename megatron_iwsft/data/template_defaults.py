"""A chat template with the date and the variables that a corpus was rendered with, for the models that are trained on it.

Without them the prompts of an exported model would have today's date, where a template asks for it, and not the training's.
"""

from __future__ import annotations

import ast
import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_iwsft.errors import ConfigError, DataError

DEFAULT_DATE = "2024-07-26"  # Llama 3.2's template writes this one where it has no clock
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# A default as `with_defaults` writes it.
_DEFAULT = re.compile(r"\{%- if (\w+) is not defined %\}\{%- set \1 = (.*?) %\}\{%- endif %\}")


@dataclass(frozen=True)
class TemplateVariables:
    """What a chat template is given beside the messages. Raises DataError for a value that is not JSON, or no date.

    date     for a template that asks for today's, as YYYY-MM-DD; None for DEFAULT_DATE
    options  (name, value as JSON) of further variables, such as ("enable_thinking", "false")
    """

    date: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.options:
            try:
                json.loads(value)
            except ValueError:
                raise DataError(
                    f"--template-option {name}={value} is not JSON. Write NAME=true, NAME=3 or NAME='\"text\"'."
                ) from None
        try:
            datetime.date.fromisoformat(self.date or DEFAULT_DATE)
        except ValueError:
            raise DataError(f"--date {self.date} is not a date of the form YYYY-MM-DD.") from None

    @property
    def values(self) -> dict[str, Any]:
        """Of the options, by name."""
        return {name: json.loads(value) for name, value in self.options}

    @property
    def day(self) -> datetime.date:
        return datetime.date.fromisoformat(self.date or DEFAULT_DATE)

    def check(self, source: str, of: str) -> None:
        """Raise ConfigError if the template `source`, of the model `of`, has another date or another value written into it."""
        if self.date is not None and not reads_clock(source):
            raise ConfigError(
                f"--date {self.date}: the chat template of {of} does not ask for a date. A model that this program exported has the date "
                "of its training in its template. Leave out --date."
            )
        trained = defaults_of(source)
        for name, value in self.values.items():
            if name in trained and trained[name] != value:
                raise ConfigError(
                    f"--template-option {name}={json.dumps(value)}: {of} was trained with {name}={json.dumps(trained[name])}, which its "
                    "chat template sets. Leave the option out."
                )


NO_VARIABLES = TemplateVariables()


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


def defaults_of(source: str) -> dict[str, Any]:
    """The values that `with_defaults` wrote into a template, by name."""
    line = source.partition("\n")[0]
    found = _DEFAULT.findall(line) if _DEFAULT.sub("", line) == "" else []
    try:
        return {name: ast.literal_eval(value) for name, value in found}
    except (ValueError, SyntaxError):
        return {}
