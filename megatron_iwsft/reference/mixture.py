"""The sidecars of a mixture's corpora, addressed by trajectories of the mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.reference.sidecar import ReferenceIdentity, Sidecar, SidecarWriter, logprobs_by_trajectory


class MixtureSidecars:
    """Open, complete sidecars of all corpora; called with i, float32 [num_tokens] of trajectory i of the mixture.

    Raises DataError as `Sidecar` does.
    """

    def __init__(self, mixture: Mixture, identities: Sequence[ReferenceIdentity]) -> None:
        self._mixture = mixture
        self._sidecars = [
            Sidecar(corpus, identity) for corpus, identity in zip(mixture.corpora, identities, strict=True)
        ]

    def damage(self, rank: int, size: int) -> list[str]:
        """The complaints of `Sidecar.damage` about all of them."""
        return [complaint for sidecar in self._sidecars for complaint in sidecar.damage(rank, size)]

    def __call__(self, i: int) -> np.ndarray:
        corpus, k = self._mixture.locate(i)
        return self._sidecars[corpus](k)


class MixtureSidecarWriter:
    """Fills the sidecars of a mixture's corpora, except those that are complete already: as `SidecarWriter`, for several."""

    def __init__(self, mixture: Mixture, identities: Sequence[ReferenceIdentity]) -> None:
        self._mixture = mixture
        self._writers = [
            SidecarWriter(corpus, identity) for corpus, identity in zip(mixture.corpora, identities, strict=True)
        ]
        self._complete = [False] * len(self._writers)

    @property
    def directories(self) -> list[str]:
        return [str(writer.directory) for writer in self._writers]

    def skip_complete(self, platform: Platform) -> bool:
        """Leave sidecars that are complete by now unchanged; returns whether all are. Collective: ranks see shared files at slightly
        different times, and must agree.
        """
        self._complete = [bool(seen) for seen in platform.largest(*(writer.complete for writer in self._writers))]
        return all(self._complete)

    @property
    def _pending(self) -> list[SidecarWriter]:
        return [writer for writer, complete in zip(self._writers, self._complete, strict=True) if not complete]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """`SidecarWriter.lock` of those that are not complete."""
        with ExitStack() as stack:
            for writer in self._pending:
                stack.enter_context(writer.lock())
            yield

    def prepare(self) -> None:
        for writer in self._pending:
            writer.prepare()

    def open(self) -> None:
        for writer in self._pending:
            writer.open()

    def done(self, i: int) -> bool:
        """Whether every position of trajectory i has its value."""
        corpus, k = self._mixture.locate(i)
        return self._complete[corpus] or self._writers[corpus].done(k)

    def write(self, batch: Batch, logprobs: Tensor) -> None:
        """Store logprobs float32 [T] of this rank's micro-batch (its context-parallel slice)."""
        for i, positions, values in logprobs_by_trajectory(batch, logprobs):
            corpus, k = self._mixture.locate(i)
            if not self._complete[corpus]:
                self._writers[corpus].write(k, positions, values)

    def flush(self) -> None:
        for writer in self._pending:
            writer.flush()

    def finish(self, described: dict[str, Any]) -> list[tuple[str, int]]:
        """`SidecarWriter.finish` of those that were not complete: (directory, trajectories) of each."""
        for writer in self._pending:
            writer.finish(described)
        return [(str(writer.directory), len(writer.corpus)) for writer in self._pending]
