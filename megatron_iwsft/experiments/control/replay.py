"""Recorded episodes, and the selection of those that a method trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_iwsft.errors import DataError


@dataclass
class Episode:
    """An episode while it is recorded: float32 [O] and [A] per step, and the return so far."""

    observations: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    total: float = 0.0


@dataclass(frozen=True)
class Replay:
    """Complete episodes, concatenated in the order in which they were played: E episodes, T steps in total.

    observations float32 [T, O]
    actions      float32 [T, A]   as sampled, before the environment clips them
    starts       int64   [E + 1]  episode i is steps starts[i] … starts[i + 1] − 1
    returns      float64 [E]      undiscounted
    """

    observations: Tensor
    actions: Tensor
    starts: Tensor
    returns: Tensor

    @property
    def lengths(self) -> Tensor:
        """Steps per episode, int64 [E]."""
        return self.starts.diff()

    def select(self, percentiles: list[float]) -> Tensor:
        """Select the curated episodes: int64 indices, one entry for every threshold that an episode's return reaches.

        Several percentiles are the authors' nested filters: an episode that reaches three of them is listed three times.
        """
        thresholds = [float(np.percentile(self.returns.numpy(), p)) for p in percentiles]
        return torch.cat([(self.returns >= threshold).nonzero().flatten() for threshold in thresholds])

    def steps(self, episodes: Tensor) -> tuple[Tensor, Tensor]:
        """The steps of a batch of episodes: (indices into T, position in `episodes` of the episode they belong to), int64 [T'] each."""
        lengths = self.lengths[episodes]
        segment = torch.repeat_interleave(torch.arange(len(episodes)), lengths)
        within = torch.arange(len(segment)) - (lengths.cumsum(0) - lengths)[segment]
        return self.starts[episodes][segment] + within, segment

    @staticmethod
    def of(episodes: list[Episode]) -> Replay:
        """Concatenate episodes. Raises DataError if there are none."""
        if not episodes:
            raise DataError("no episode ended within learner.replay_steps; increase it.")
        return Replay(
            observations=torch.from_numpy(np.concatenate([np.stack(e.observations) for e in episodes])).float(),
            actions=torch.from_numpy(np.concatenate([np.stack(e.actions) for e in episodes])).float(),
            starts=torch.tensor([0, *[len(e.actions) for e in episodes]]).cumsum(0),
            returns=torch.tensor([e.total for e in episodes], dtype=torch.float64),
        )
