"""Build `Batch`es from packs of trajectories. Every rank reads the memory-mapped corpus itself; nothing is broadcast."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron_iwsft.data.balance import SegmentCosts, deal, pack_costs, pack_sums
from megatron_iwsft.data.batch import IGNORE, Batch
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Sampler

# trajectory index → float32 [num_tokens], the reference log-prob of each token, 0 where not trained on
ReferenceLogprobs = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class RowShape:
    """Padding rules of a packed row. All values are in tokens.

    segment_multiple  each segment is padded to a multiple of this: 2·cp for the context-parallel zigzag layout
    row_multiple      the row is padded to a multiple of this, so that sequence parallelism can split it over tp ranks into
                      parts that are multiples of `alignment`, as FP8 matmuls require
    row_length        length of every row, or None to fit the longest row of each global batch
    packed_multiple   what trajectories were padded to when they were packed into rows of row_length
    trimmed           each row ends with its last trajectory: possible where no pipeline passes rows of one length on
    """

    segment_multiple: int
    row_multiple: int
    row_length: int | None
    packed_multiple: int = 1
    trimmed: bool = False

    @staticmethod
    def of(
        *,
        tensor: int,
        context: int,
        row_length: int | None,
        alignment: int = 1,
        packed_multiple: int = 1,
        trimmed: bool = False,
    ) -> RowShape:
        segment = 2 * context if context > 1 else 1
        return RowShape(segment, segment * tensor * alignment, row_length, packed_multiple, trimmed)

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.segment_multiple) * self.segment_multiple

    def longest(self, lengths: np.ndarray, packs: list[np.ndarray], size: int) -> int:
        """Tokens that the longest row needs, of `size` packs each. Looks at the lengths only where packing does not ensure it."""
        if self.row_length is not None and self.packed_multiple % self.segment_multiple == 0:
            return self.row_length
        row_of = np.repeat(np.arange(len(packs)) // size, [len(pack) for pack in packs])
        return int(np.bincount(row_of, self.padded(lengths[np.concatenate(packs)]), minlength=1).max())

    def fit(self, needed: int) -> int:
        """Row length in tokens for rows that need up to `needed` tokens."""
        wanted = max(needed, 1 if self.trimmed else self.row_length or 1)
        return -(-wanted // self.row_multiple) * self.row_multiple


class BatchesAhead:
    """Builds the micro-batches of the next step in a thread while this one trains.

    build   global step → micro-batches
    pinned  whether they are to be copied to a GPU
    """

    def __init__(self, build: Callable[[int], list[Batch]], *, pinned: bool) -> None:
        self._build, self._pinned = build, pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._step: int | None = None
        self._next: Future[list[Batch]] | None = None

    def at_step(self, step: int, *, following: int | None) -> list[Batch]:
        """The micro-batches of `step`, and a start on those of `following`. Raises what building them raised."""
        if self._next is None or self._step != step:  # the first step, or a run that has skipped some or gone back
            self._next = self._thread.submit(self._make, step)
        batches = self._next.result()
        self._step, self._next = following, None
        if following is not None:
            self._next = self._thread.submit(self._make, following)
        return batches

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        batches = self._build(step)
        return [batch.pinned() for batch in batches] if self._pinned else batches


class BatchBuilder:
    """Builds this rank's micro-batches of a global step.

    groups: int [groupings, n], the group of each of the corpus's trajectories in each grouping (`Batch.groups`).

    The global batch and its packs are the same for every parallel layout; only their assignment to ranks differs. Micro-batch m
    of data-parallel rank d holds packs (m·dp + d)·b … (m·dp + d + 1)·b − 1 of the global batch, with b the micro-batch size. With
    `costs`, of segments, and several data-parallel ranks, packs are dealt first so that ranks have equally much to compute.
    """

    def __init__(
        self,
        corpus: Corpus | Mixture,
        sampler: Sampler,
        shape: RowShape,
        *,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        context_rank: int = 0,
        context_size: int = 1,
        reference: ReferenceLogprobs | None = None,
        costs: SegmentCosts | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.corpus, self.sampler, self.shape = corpus, sampler, shape
        self.micro_batch_size, self.reference = micro_batch_size, reference
        self.data_rank, self.data_size = data_rank, data_size
        self.context_rank, self.context_size = context_rank, context_size
        self.costs, self.groups = costs, groups
        # A segment of filler is no longer than a trajectory can be: attention, or a mask for it, costs the square.
        self._longest = int(shape.padded(corpus.lengths.max(initial=1)))

    def at_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`, all with the same row length unless rows are trimmed."""
        return self.from_packs(self.sampler.packs_at(step))

    def from_packs(self, packs: list[np.ndarray]) -> list[Batch]:
        """This rank's micro-batches of a global batch, given as packs of trajectory indices."""
        size = self.micro_batch_size
        packs = self.dealt(packs)
        shape, lengths = self.shape, self.corpus.lengths
        longest = 0 if shape.trimmed else shape.longest(lengths, packs, size)
        batches = []
        for i in range(self.data_rank * size, len(packs), self.data_size * size):
            ids = np.concatenate(packs[i : i + size])
            row = self._row(ids, shape.fit(longest or int(shape.padded(lengths[ids]).sum())))
            own = row.slice_for_context_parallel(self.context_rank, self.context_size)
            batches.append(own.with_trained_positions())
        return batches

    def dealt(self, packs: list[np.ndarray]) -> list[np.ndarray]:
        """The packs in the order in which ranks take them, which makes the ranks' work even."""
        if self.costs is None or self.data_size == 1:
            return packs
        dealt = deal(self.costs_of(packs, self.costs), ranks=self.data_size)
        by_micro_batch = dealt.reshape(self.data_size, -1, self.micro_batch_size).swapaxes(0, 1)
        return [packs[p] for p in by_micro_batch.ravel().tolist()]

    def costs_of(self, packs: list[np.ndarray], costs: SegmentCosts) -> np.ndarray:
        """What each pack costs with its filler, int64 [P]. Every rank computes it for the whole global batch: no loop over packs."""
        counts = np.fromiter(map(len, packs), np.int64, len(packs))
        sizes = self.shape.padded(self.corpus.lengths[np.concatenate(packs)].astype(np.int64))
        # All rows of a step have one length, but filler attends to itself. Of several packs in a row, which share filler, it is left out.
        shares_filler = self.micro_batch_size > 1 or self.shape.trimmed
        capacity = 0 if shares_filler else self.shape.fit(int(pack_sums(sizes, counts).max()))
        return pack_costs(sizes, counts, capacity, costs, piece=self._longest)

    def _groups_of(self, ids: np.ndarray, pad: int) -> np.ndarray:
        assert self.groups is not None
        return np.pad(self.groups[:, ids].astype(np.int64), ((0, 0), (0, pad)))

    def _row(self, ids: np.ndarray, length: int) -> Batch:
        sizes = self.shape.padded(self.corpus.lengths[ids]).astype(np.int64)
        filler = length - int(sizes.sum())
        pad = -(-filler // self._longest)
        sizes = np.concatenate([sizes, np.diff(np.append(np.arange(pad) * self._longest, filler))])
        boundaries = np.concatenate([[0], np.cumsum(sizes)])
        tokens = np.zeros(length, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        reference = np.zeros(length, np.float32) if self.reference is not None else None
        weights = np.ones(length, np.float32) if self.corpus.has_turn_weights else None
        trained = []
        for i, start in zip(ids.tolist(), boundaries.tolist(), strict=False):
            text, mask = self.corpus.tokens(i).astype(np.int64), self.corpus.mask(i)
            n = len(text)
            tokens[start : start + n] = text
            labels[start : start + n - 1] = np.where(mask[1:] == 1, text[1:], IGNORE)
            # The first token of a trajectory is never a label, so a mask that includes it trains one token less.
            trained.append(int((mask[1:] == 1).sum()))
            if reference is not None and self.reference is not None:
                reference[start : start + n - 1] = self.reference(i)[1:]
            if weights is not None and (of_tokens := self.corpus.token_weights(i)) is not None:
                weights[start : start + n - 1] = of_tokens[1:]
        return Batch(
            tokens=torch.from_numpy(tokens)[None],
            labels=torch.from_numpy(labels)[None],
            position_ids=torch.from_numpy(np.arange(length) - np.repeat(boundaries[:-1], sizes))[None],
            segment=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            reference=None if reference is None else torch.from_numpy(reference),
            cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
            max_seqlen=int(sizes.max()),
            lengths=torch.tensor([*trained, *[0] * pad], dtype=torch.float32),
            quality=torch.from_numpy(np.append(self.sampler.trajectory_weights(ids), np.zeros(pad, np.float32))),
            turn_weights=None if weights is None else torch.from_numpy(weights),
            trajectory=torch.from_numpy(np.append(ids, [-1] * pad).astype(np.int64)),
            groups=None if self.groups is None else torch.from_numpy(self._groups_of(ids, pad)),
        )
