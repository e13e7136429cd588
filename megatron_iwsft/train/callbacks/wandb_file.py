"""What an offline run of Weights & Biases holds: its service writes the file every few seconds, so that of a killed run lacks rows.

The file is a log as LevelDB's: after 7 bytes, records in blocks of 32 KiB, each fragment after its CRC (4 bytes), length (2) and kind (1).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_iwsft.utils.files import open_regular

_BLOCK, _HEADER = 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4
_TAIL = 128 * _BLOCK  # bytes that are read, from the end


def last_step(run_directory: Path, run_id: str) -> int:
    """The last step with a row in the files of run `run_id`; -1 if there is none."""
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # made when it is imported
    found = -1
    for path in run_directory.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        try:
            for content in _records(path):
                record = proto.Record()
                record.ParseFromString(content)
                if record.WhichOneof("record_type") == "history":
                    found = max(found, record.history.step.num)
        except Exception:  # damaged, or of another version: what is before counts
            continue
    return found


def _records(path: Path) -> Iterator[bytes]:
    """The complete records at the end of a file."""
    with open_regular(path) as file:
        begin = max(0, os.fstat(file.fileno()).st_size - _TAIL) // _BLOCK * _BLOCK
        file.seek(begin)
        data = file.read()
    at, parts = (0 if begin else _HEADER), list[bytes]()
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # padding
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        fragment = data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if len(fragment) < size:
            return
        if kind in (_WHOLE, _FIRST):
            parts = [fragment]
        elif parts:  # else of a record that begins before the part that is read
            parts.append(fragment)
        if kind in (_WHOLE, _LAST) and parts:
            yield b"".join(parts)
            parts = []
