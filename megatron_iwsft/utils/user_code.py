"""Functions and objects from a user's own Python file, named in a config as path/to/file.py:name."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_iwsft.errors import ConfigError, UserError


def load_from_file(name: str, key: str) -> Any:
    """What `path/to/file.py:name` defines. key: of the config, for messages. Raises ConfigError if it cannot be loaded.

    A file is executed once per process and version of its contents, so that several names of one file share its state.
    """
    path, _, attribute = name.rpartition(":")
    module = _load(Path(path), key) if Path(path).is_file() else None
    if module is None:
        raise ConfigError(f"{key}: {path or name} is not a Python file. Write path/to/file.py:name.")
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{key}: {path} does not define {attribute}. Correct the name after the colon.")
    return found


def _load(path: Path, key: str) -> ModuleType | None:
    """The file as a module; None if it is not a Python file. Python's import would take compiled code beside it that looks as old."""
    source = path.read_bytes()
    identity = str(path.resolve()).encode() + b"\0" + source
    name = f"iwsft_user_{path.stem}_{hashlib.sha256(identity).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if path.suffix != ".py":
        return None
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look up annotations that are strings
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except UserError as error:  # of an objective or a metric that it defines
        del sys.modules[name]
        raise ConfigError(f"{key}: {path}: {error}") from error
    except Exception as error:  # a user's file can raise anything
        del sys.modules[name]
        raise ConfigError(
            f"{key}: {path} cannot be loaded: {type(error).__name__}: {error}. Correct the file."
        ) from error
    return module
