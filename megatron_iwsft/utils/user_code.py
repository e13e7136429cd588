"""Functions and objects from a user's own Python file, named in a config as path/to/file.py:name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megatron_iwsft.errors import ConfigError


def load_from_file(name: str, key: str) -> Any:
    """What `path/to/file.py:name` defines. key: of the config, for messages. Raises ConfigError if it cannot be loaded."""
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {path or name} is not a Python file. Write path/to/file.py:name.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file can raise anything
        raise ConfigError(f"{key}: {path} cannot be loaded: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{key}: {path} does not define {attribute}.")
    return found
