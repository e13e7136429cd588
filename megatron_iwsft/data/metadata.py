"""shard-00000.meta.parquet: what is known about each trajectory besides its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_iwsft.data.indexed import check_own_file
from megatron_iwsft.errors import DataError

TURN_WEIGHTS = pa.list_(pa.float32())  # of each run of trained tokens; null where all are 1
META = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float64()),
        ("num_tokens", pa.int32()),
        ("num_trained", pa.int32()),
        ("turn_weights", TURN_WEIGHTS),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content_hash", pa.binary(32)),
    ]
)


def meta_path(directory: Path, shard: str) -> Path:
    return directory / f"{shard}.meta.parquet"


def read_meta(directory: Path, shards: Sequence[str], columns: list[str] | None) -> pa.Table:
    """The metadata of some shards, concatenated. Raises DataError if a file is missing or damaged."""
    schema = pa.schema([META.field(name) for name in columns or META.names])
    tables = []
    for name in shards:
        path = meta_path(directory, name)
        check_own_file(path)
        try:
            table = pq.read_table(path, columns=columns)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}. Shard the records again.") from None
        if not table.schema.equals(schema):
            raise DataError(f"{path} is damaged: it does not have the columns of a corpus. Shard the records again.")
        tables.append(table)
    return pa.concat_tables(tables) if tables else schema.empty_table()


def read_turn_weights(directory: Path, shard: str) -> pa.ListArray:
    """The column turn_weights of a shard. Corpora that were made before messages could have weights have no such column."""
    file = pq.ParquetFile(meta_path(directory, shard))
    if "turn_weights" not in file.schema_arrow.names:
        return pa.nulls(file.metadata.num_rows, TURN_WEIGHTS)
    return read_meta(directory, [shard], ["turn_weights"])["turn_weights"].combine_chunks()


@dataclass(frozen=True)
class Sources:
    """The source of each trajectory. names: sorted; numbers int32 [n], of each trajectory's source among them."""

    names: list[str]
    numbers: np.ndarray

    @staticmethod
    def of(column: pa.ChunkedArray | Sequence[str]) -> Sources:
        """Of the source of each trajectory."""
        column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column], pa.string())
        coded = column.combine_chunks().dictionary_encode()
        return Sources.joined([Sources(coded.dictionary.to_pylist(), coded.indices.to_numpy())])

    @staticmethod
    def joined(parts: Sequence[Sources]) -> Sources:
        """Of the trajectories of one part after those of another."""
        names = sorted({name for part in parts for name in part.names})
        place = {name: number for number, name in enumerate(names)}
        numbers = [np.array([place[name] for name in part.names], np.int32)[part.numbers] for part in parts]
        return Sources(names, np.concatenate([np.zeros(0, np.int32), *numbers]))
