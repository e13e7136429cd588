"""What one rank finds out for all, and what all ranks must agree on. Every function is collective over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_iwsft.errors import UserError

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on the first rank only; its result, or the UserError or OSError that it raised, is that of all ranks.

    Collective: a broadcast.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def own_share(everything: Sequence[T]) -> Sequence[T]:
    """This rank's share of work that all ranks do together. Not collective: `everything` is the same on all ranks."""
    return everything[dist.get_rank() :: dist.get_world_size()]


def complaints_of_all(own: Sequence[str]) -> list[str]:
    """The complaints of all ranks in the order of ranks, each once. Collective: a maximum, and a gather if there are any."""
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend()) else "cpu"
    most = torch.tensor(len(own), dtype=torch.int, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if not int(most):
        return []
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, list(own))
    return list(dict.fromkeys(text for rank in gathered for text in rank))
