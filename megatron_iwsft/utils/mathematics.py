"""math-verify, which compares mathematical answers."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType


@cache
def import_math_verify() -> ModuleType:
    """math-verify, without its warnings, which quote whole texts as they are. Raises ImportError if it is not installed."""
    for library in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return importlib.import_module("math_verify")
