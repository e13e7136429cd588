"""Objects loaded from a user's Python file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.user_code import load_from_file

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Counter:
    count: int = 0
    names: list[str] = field(default_factory=list)

counter = Counter()
def add():
    counter.count += 1
    return counter
"""


def test_a_dataclass_with_postponed_annotations_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(DATACLASS)
    assert load_from_file(f"{tmp_path}/own.py:add", "key")().count == 1


def test_names_of_one_file_share_its_state_and_files_of_one_name_do_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(DATACLASS)
    load_from_file(f"{tmp_path}/a/own.py:add", "key")()
    assert load_from_file(f"{tmp_path}/a/../a/own.py:counter", "key").count == 1
    assert load_from_file(f"{tmp_path}/b/own.py:counter", "key").count == 0


def test_a_changed_or_repaired_file_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python keeps compiled code, which looks up to date after a change of the same length within a second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "own.py"
    for text, value in (("x = 1\n", 1), ("x = 2\n", 2)):
        file.write_text(text)
        assert load_from_file(f"{file}:x", "key") == value
    file.write_text("import missing_module\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"own\.py cannot be loaded: ModuleNotFoundError"):
            load_from_file(f"{file}:x", "key")


def test_annotations_are_what_the_file_says(tmp_path: Path) -> None:
    """Not strings, which a `from __future__` of the loading module would make of them."""
    (tmp_path / "own.py").write_text("def loss(x: int) -> int:\n    return x\n")
    assert load_from_file(f"{tmp_path / 'own.py'}:loss", "key").__annotations__ == {"x": int, "return": int}
