"""`Batch`: one micro-batch on one rank. Its docstring defines the shape symbols used throughout the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the label of a position that is not trained on


@dataclass(frozen=True)
class Batch:
    """One micro-batch: trajectories laid end to end in one packed row.

    T is the number of tokens on this rank (after context-parallel slicing), S the number of segments. A segment is one
    trajectory, padded to the multiple that slicing needs; the last segments may be filler without trained tokens. H is the
    hidden size, V the padded vocabulary size, tp/pp/cp/dp the parallel sizes.

    tokens        int64   [1, T]
    labels        int64   [1, T]   next token of the same segment, IGNORE where not trained on
    position_ids  int64   [1, T]   restarts at 0 in each segment
    segment       int64   [T]      0 … S−1
    turn_weights  float32 [T]      weight of the label's turn; None where no trajectory of the corpus has turns of different weights
    reference     float32 [T]      r_t of the label, 0 where not trained on; None without a cached reference
    cu_seqlens    int32   [S+1]    segment boundaries of the full row, before context-parallel slicing
    max_seqlen    int              length of the longest segment
    lengths       float32 [S]      |M_i|, number of trained tokens of the full trajectory
    quality       float32 [S]      trajectory weight s_i
    trajectory    int64   [S]      index in the corpus, −1 for filler
    groups        int64   [·, S]   in each grouping of the corpus's trajectories, the segment's group; 0 for filler. None without groupings
    trained       int64   [n]      positions on this rank whose label is trained on. Found on the host, because finding them on a GPU
                                   would make the host wait for it; None leaves it to the GPU
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segment: Tensor
    reference: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: Tensor
    quality: Tensor
    trajectory: Tensor
    turn_weights: Tensor | None = None
    groups: Tensor | None = None
    trained: Tensor | None = None

    @property
    def num_segments(self) -> int:
        return self.lengths.numel()

    @property
    def mask(self) -> Tensor:
        """float32 [T], 1 where trained on."""
        return (self.labels[0] != IGNORE).float()

    def to(self, device: torch.device) -> Batch:
        """On a device; the host does not wait for copies from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked host memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def with_trained_positions(self) -> Batch:
        return replace(self, trained=torch.nonzero(self.labels[0] != IGNORE).flatten())

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(value) for k, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def slice_for_context_parallel(self, rank: int, size: int) -> Batch:
        """This rank's part of every segment: of its 2·size chunks, number `rank` from the front and from the back.

        The pairing balances causal-attention work across ranks (Transformer Engine's layout for packed sequences).
        Labels are shifted before slicing, so no label is lost at a chunk boundary.
        """
        if size == 1:
            return self
        index = zigzag_index(self.cu_seqlens.cpu().numpy(), rank, size)
        at = torch.from_numpy(index).to(self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[:, at],
            labels=self.labels[:, at],
            position_ids=self.position_ids[:, at],
            segment=self.segment[at],
            reference=None if self.reference is None else self.reference[at],
            turn_weights=None if self.turn_weights is None else self.turn_weights[at],
        )


def zigzag_index(cu_seqlens: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Positions in the full row held by context-parallel rank `rank` of `size`, int64 [T/size], in local order."""
    parts = []
    for start, stop in itertools.pairwise(cu_seqlens):
        chunk = (stop - start) // (2 * size)
        for i in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(start + i * chunk, start + (i + 1) * chunk))
    return np.concatenate(parts).astype(np.int64)
