"""Callbacks from a user's own file: `logging.callbacks: [path/to/file.py:function]`."""

from __future__ import annotations

import traceback
from typing import Any

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.callbacks import Callback, CallbackFunction, StepResult
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.utils.user_code import load_from_file


def load_callbacks(names: list[str]) -> dict[str, CallbackFunction]:
    """The functions that `logging.callbacks` names. Raises ConfigError if one cannot be loaded."""
    found = {name: load_from_file(name, "logging.callbacks") for name in names}
    for name, function in found.items():
        if not callable(function):
            raise ConfigError(
                f"logging.callbacks: {name} is not a function. Name a function: path/to/file.py:function."
            )
        every = getattr(function, "every", 1)
        if type(every) is not int or every < 0:
            raise ConfigError(f"logging.callbacks: {name}.every must be a number of steps; found {every!r}.")
    return found


def custom_callback(name: str, function: CallbackFunction, events: Events) -> Callback:
    """A user's function as a callback. Its attributes `every`, `at_end` and `collective` set when and where it is called.

    One that is not collective is `guarded`. A collective one ends the run, since its ranks may wait for each other.
    """
    every = getattr(function, "every", 1)
    at_end, collective = (bool(getattr(function, attribute, False)) for attribute in ("at_end", "collective"))
    called = function if collective else guarded(f"callback {name}", function, events)
    return Callback(called, every, at_end, collective=collective, phase=name)


def guarded(what: str, function: CallbackFunction, events: Events) -> CallbackFunction:
    """If `function` raises, this is reported once and it is not called again: a broken logger must not cost a training run."""
    failed = False

    def call(result: StepResult) -> dict[str, Any] | None:
        nonlocal failed
        if not failed:
            try:
                return function(result)
            except Exception:  # a user's function, or another program's, can raise anything
                failed = True
                events(
                    "callback failed",
                    f"the {what} failed at step {result.step}. It is not called again; training continues.\n"
                    + traceback.format_exc(),
                    step=result.step,
                )
        return None

    return call
