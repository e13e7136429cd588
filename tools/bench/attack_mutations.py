"""What tools/bench/attacks.py does to files: each mutation changes one, and says what it did."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE_RAN = "code-ran"


class _RunsCode:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.sentinel / CODE_RAN}",)


def flip(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = bytearray(path.read_bytes() or b" ")
    places = [rng.randrange(len(content)) for _ in range(rng.choice([1, 1, 5, 50]))]
    for place in places:
        content[place] = rng.randrange(256)
    path.write_bytes(content)
    return f"{len(places)} bytes changed"


def cut(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = path.read_bytes()
    at = rng.choice([0, 1, len(content) // 2, max(0, len(content) - 1), rng.randrange(len(content) + 1)])
    path.write_bytes(content[:at])
    return f"cut to {at} of {len(content)} bytes"


def extend(path: Path, rng: random.Random, sentinel: Path) -> str:
    tail = rng.choice([b"\0" * 100, b"\xff\xfe\x1b[2J", b"{" * 200_000, rng.randbytes(1000)])
    path.write_bytes(path.read_bytes() + tail)
    return f"{len(tail)} bytes appended"


def replace(path: Path, rng: random.Random, sentinel: Path) -> str:
    content = rng.choice(
        [
            b"",
            b"\0" * 1000,
            b"[" * 100_000,
            b"null",
            b"[]",
            b"{}",
            b"\xff\xfe",
            b"%$\n" * 10,
            b"{'a': !!python/object:os.system}",
        ]
    )
    path.write_bytes(content)
    return f"replaced by {content[:20]!r}"


def run_code(path: Path, rng: random.Random, sentinel: Path) -> str:
    if zipfile.is_zipfile(path):
        import torch

        torch.save(_RunsCode(sentinel), path)
    else:
        path.write_bytes(pickle.dumps(_RunsCode(sentinel), protocol=rng.choice([0, 2, 4])))
    if rng.random() < 0.7:
        _relist(path)
    return "replaced by a pickle that runs code"


def irregular(path: Path, rng: random.Random, sentinel: Path) -> str:
    path.unlink()
    kind = rng.choice(["directory", "pipe", "link", "dangling link", "link to itself", "nothing"])
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link": sentinel / "precious.txt", "dangling link": "nowhere"}.get(kind, path))
    return f"a {kind}" if kind != "nothing" else "removed"


# fmt: off
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), [], {}, [[[]]], "", "a\0b", "../../sentinel/precious.txt",
    "x" * 100_000, "\x1b[2J", "{{ 1/0 }}", "{% for a in range(10**9) %}{% endfor %}",
]
# fmt: on


def change_json(path: Path, rng: random.Random, sentinel: Path) -> str:
    """Another value somewhere in a JSON document or a checkpoint's metadata; in other files, bytes."""
    if path.name == ".metadata":
        return change_metadata(path, rng, sentinel)
    try:
        document = json.loads(path.read_text())
    except ValueError:
        return flip(path, rng, sentinel)
    places = list(_places(document))
    if not places:
        return replace(path, rng, sentinel)
    holder, key = rng.choice(places)
    value = rng.choice([*VALUES, str(sentinel / "precious.txt")])
    if rng.random() < 0.2:
        del holder[key]
        change = "removed"
    elif isinstance(holder, dict) and rng.random() < 0.2:
        holder[value if isinstance(value, str) else repr(value)] = holder.pop(key)
        change = f"renamed to {value!r:.40}"
    else:
        holder[key] = value
        change = f"= {value!r:.40}"
    path.write_text(json.dumps(document))
    if rng.random() < 0.5:
        _relist(path)
    return f"{key!r:.40} {change}"


def change_metadata(path: Path, rng: random.Random, sentinel: Path) -> str:
    """Another value of an attribute of an object in a checkpoint's metadata, or of one of its entries."""
    import torch

    metadata = pickle.loads(path.read_bytes())  # our own
    objects = [metadata, *metadata.state_dict_metadata.values(), *metadata.storage_data.values()]
    objects += [chunk for entry in objects for chunk in getattr(entry, "chunks", [])]
    entries = (metadata.state_dict_metadata, metadata.storage_data)
    holder = rng.choice([holder for holder in (*map(vars, objects), *entries) if holder])
    key = rng.choice(list(holder))
    value = rng.choice(
        [*VALUES, str(sentinel / "precious.txt"), torch.Size((2**40, 2**40)), torch.Size((-1,)), *objects]
    )
    holder[key] = value
    path.write_bytes(pickle.dumps(metadata))
    if rng.random() < 0.7:
        _relist(path)
    return f"{key!r:.40} = {value!r:.40}"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(items):
        yield document, key
        yield from _places(value)


def _relist(path: Path) -> None:
    """Give a checkpoint the checksums of its files as they are now, as an attacker who knows the format would."""
    from megatron_iwsft.checkpoint.info import INFO, info_checksum
    from megatron_iwsft.checkpoint.integrity import file_sum

    for directory in (path.parent, path.parent.parent):
        file = directory / INFO
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            info = json.loads(file.read_text())
            info["files"] = (
                {name: file_sum(directory / name) for name in info["files"]} if path.name != INFO else info["files"]
            )
            info.pop("checksum", None)
            file.write_text(json.dumps(info | {"checksum": info_checksum(info)}))


MUTATIONS = [flip, flip, cut, extend, replace, run_code, irregular, change_json, change_json, change_json, change_json]
