"""What an open corpus knows of each trajectory without reading its tokens; one copy per node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_iwsft.data.indexed import IndexedReader, index_differs
from megatron_iwsft.data.metadata import read_meta, read_turn_weights
from megatron_iwsft.errors import DataError
from megatron_iwsft.utils.node_arrays import node_arrays

_AGAIN = "Shard the records again."


@dataclass(frozen=True)
class CorpusIndex:
    """Arrays over the n trajectories of all shards, in order.

    sizes        int64   [shards]  trajectories per shard
    lengths      int32   [n]  tokens
    starts       int64   [n]  tokens of the same shard before it
    num_trained  int32   [n]  |M_i|, trained tokens
    scores       float64 [n]  NaN where there is none
    weighted     int64   [m]  the trajectories with turns of different weights, ascending
    weight_ends  int64   [m]  where the weights of each end in weights
    weights      float32 [·]  of each run of trained tokens
    """

    sizes: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    num_trained: np.ndarray
    scores: np.ndarray
    weighted: np.ndarray
    weight_ends: np.ndarray
    weights: np.ndarray

    @staticmethod
    def open(directory: Path, shards: Sequence[str], *, fingerprint: str) -> CorpusIndex:
        """Of a corpus with this fingerprint. Raises DataError if the indices and the metadata contradict each other, or contain what
        sharding never writes.
        """
        key = f"index of {fingerprint} at {directory.absolute()}"
        return CorpusIndex(**node_arrays(key, lambda: vars(_read(directory, shards))))

    def turn_weights(self, trajectory: int) -> np.ndarray | None:
        """The weight of each run of a trajectory's trained tokens, float32; None if all are 1."""
        at = int(np.searchsorted(self.weighted, trajectory))
        if at == len(self.weighted) or self.weighted[at] != trajectory:
            return None
        return self.weights[self.weight_ends[at - 1] if at else 0 : self.weight_ends[at]]


def _read(directory: Path, shards: Sequence[str]) -> CorpusIndex:
    parts = [_read_shard(directory, name) for name in shards]
    first = np.cumsum([0, *(len(part.lengths) for part in parts)])
    weights_before = np.cumsum([0, *(len(part.weights) for part in parts)])

    def joined(name: str, dtype: type[np.generic], added: np.ndarray | None = None) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        if added is not None:
            arrays = [array + more for array, more in zip(arrays, added.tolist(), strict=False)]
        return np.concatenate([np.zeros(0, dtype), *arrays])

    return CorpusIndex(
        sizes=np.diff(first),
        lengths=joined("lengths", np.int32),
        starts=joined("starts", np.int64),
        num_trained=joined("num_trained", np.int32),
        scores=joined("scores", np.float64),
        weighted=joined("weighted", np.int64, first),
        weight_ends=joined("weight_ends", np.int64, weights_before),
        weights=joined("weights", np.float32),
    )


def _read_shard(directory: Path, name: str) -> CorpusIndex:
    tokens = IndexedReader(directory / name, (np.uint16, np.int32))
    if index_differs(directory / f"{name}.mask", tokens.lengths):
        IndexedReader(directory / f"{name}.mask", (np.uint8,))  # it may be damaged otherwise
        raise DataError(f"{directory / name}: tokens and masks differ in length. {_AGAIN}")
    meta = read_meta(directory, [name], ["score", "num_tokens", "num_trained"])
    if len(tokens) != meta.num_rows:
        raise DataError(f"{directory / name}: {len(tokens)} sequences but {meta.num_rows} rows of metadata. {_AGAIN}")
    weights = read_turn_weights(directory, name)
    weighted = np.flatnonzero(weights.is_valid().to_numpy(zero_copy_only=False))
    given = weights.drop_null()
    index = CorpusIndex(
        sizes=np.array([len(tokens)]),
        lengths=tokens.lengths,
        starts=tokens.starts,
        num_trained=meta["num_trained"].to_numpy(),
        scores=meta["score"].fill_null(float("nan")).to_numpy(),
        weighted=weighted,
        weight_ends=np.cumsum(given.value_lengths().to_numpy(), dtype=np.int64),
        weights=given.flatten().fill_null(float("nan")).to_numpy(),
    )
    _check(index, meta["num_tokens"].to_numpy(), where=directory / name)
    return index


def _check(index: CorpusIndex, lengths: np.ndarray, *, where: Path) -> None:
    """Raise DataError if the metadata of a shard, `lengths` among them, is not what sharding writes."""

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise DataError(f"{where} is damaged: trajectory {int(np.argmax(bad))} {what}. {_AGAIN}")

    refuse(index.lengths != lengths, "differs in length from its metadata")
    trained = index.num_trained
    refuse((trained < 1) | (trained > index.lengths), "has an impossible number of trained tokens")
    refuse(np.isinf(index.scores), "has an infinite score")
    counts = np.diff(index.weight_ends, prepend=0)
    impossible = np.repeat(np.arange(len(counts)), counts)[~(np.isfinite(index.weights) & (index.weights >= 0))]
    if len(impossible) or (counts == 0).any():
        bad = np.zeros(len(index.lengths), bool)
        bad[index.weighted[np.concatenate([impossible, np.flatnonzero(counts == 0)])]] = True
        refuse(bad, "has an impossible weight of a turn")
