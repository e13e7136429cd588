"""Loading a checkpoint saved at any layout into a model, or a run's full state, at this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.info import CheckpointInfo, one_line
from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.checkpoint.pickles import check_pickles, read_metadata, restricted_unpickling
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.distributed.mcore_compat import scaling_histories_may_be_unpickled
from megatron_iwsft.errors import CheckpointError


def read_on_first_rank(directory: str | Path) -> CheckpointInfo:
    """`CheckpointInfo.read`, by the first rank for all. Collective: a broadcast. Raises CheckpointError on all ranks."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = CheckpointInfo.read(directory)
        except CheckpointError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def load(info: CheckpointInfo, state: TrainState, *, random: bool = False) -> None:
    """Load what `state` has parts for; `random` states only at the layout that the checkpoint was saved at.

    Collective over all ranks, which share the work of checking its files. Raises CheckpointError on all of them if it is damaged
    or not to be trusted.
    """
    from megatron.core import dist_checkpointing

    verify(info)
    wanted = state.sharded(random=random, stored=read_metadata(info.directory).state_dict_metadata)
    try:
        # Megatron-Core's access check gathers every rank's requests on every rank, and ignores pieces of parameters.
        with restricted_unpickling():
            loaded = dist_checkpointing.load(wanted, str(info.directory), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # a damaged file raises many kinds
        raise CheckpointError(f"{info.directory} cannot be loaded: {one_line(error)}") from error
    try:
        with scaling_histories_may_be_unpickled():  # `verify` has checked them
            state.load_sharded(loaded)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{info.directory} does not fit this model: {one_line(error)}") from error
    state.load_host_states(info.host)
    state.step = info.step


def verify(info: CheckpointInfo) -> None:
    """Check who could have written the files, their checksums and their pickles; each rank checks some files. Collective.

    Raises CheckpointError on all ranks.
    """
    complaints: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(complaints, _complaints(info))
    found = list(dict.fromkeys(text for rank in complaints for text in rank))
    if found:
        raise CheckpointError("; ".join(found) + ".")


def _complaints(info: CheckpointInfo) -> list[str]:
    """About this rank's share of the files."""
    names = sorted(info.files)[dist.get_rank() :: dist.get_world_size()]
    try:
        if dist.get_rank() == 0:  # it looks at every file
            integrity.check_trust(info.directory, [*info.files, INFO])
        damaged = integrity.damage(info.directory, info.files, names)
        return damaged or check_pickles(info.directory, read_metadata(info.directory), names)
    except CheckpointError as error:
        return [str(error).removesuffix(".")]
