"""Loading a checkpoint saved at any layout into a model, or a run's full state, at this one."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_iwsft.checkpoint import integrity
from megatron_iwsft.checkpoint.info import CheckpointInfo, one_line
from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.checkpoint.pickles import check_pickles, read_metadata, restricted_unpickling
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.distributed.agreement import complaints_of_all, on_first_rank, own_share
from megatron_iwsft.distributed.mcore_compat import reading_with, scaling_histories_may_be_unpickled
from megatron_iwsft.errors import CheckpointError

_SHOWN = 8  # complaints in one message


def read_on_first_rank(directory: str | Path) -> CheckpointInfo:
    """`CheckpointInfo.read`, by the first rank for all. Collective: a broadcast. Raises CheckpointError on all ranks."""
    return on_first_rank(lambda: CheckpointInfo.read(directory))


def load(info: CheckpointInfo, state: TrainState, *, random: bool = False) -> None:
    """Load what `state` has parts for; `random` states only at the layout that the checkpoint was saved at.

    Collective over all ranks, which share the work of checking its files. Raises CheckpointError on all of them if it is damaged
    or not to be trusted.
    """
    from megatron.core import dist_checkpointing

    metadata = verify(info)
    wanted = state.sharded(random=random, stored=metadata.state_dict_metadata)
    try:
        # Megatron-Core's access check gathers every rank's requests on every rank, and ignores pieces of parameters.
        with restricted_unpickling(), reading_with(metadata):
            loaded = dist_checkpointing.load(wanted, str(info.directory), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # a damaged file raises many kinds
        raise CheckpointError(
            f"{info.directory} cannot be loaded: {one_line(error)}. Use another checkpoint of the run."
        ) from error
    try:
        with scaling_histories_may_be_unpickled():  # `verify` has checked them
            state.load_sharded(loaded)
    # Transformer Engine's state of delayed scaling is a pickled dict, in which anything may be missing.
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{info.directory} does not fit this model: {one_line(error)}. "
            "Use a checkpoint of this model, or change model in the config."
        ) from error
    state.load_host_states(info.host)
    state.step = info.step


def verify(info: CheckpointInfo) -> Metadata:
    """Check who could have written the files, their checksums and their pickles; returns what is stored where.

    The first rank lists the directory's names and reads `.metadata`; inodes, checksums and pickles are shared out over the ranks, so
    that none looks at more of them the more ranks there are. Nothing is read before every inode has been looked at, nothing is
    unpickled before every checksum is right. Collective. Raises CheckpointError on all ranks.
    """
    names = on_first_rank(lambda: integrity.names_below(info.directory))
    _refuse(_trust_complaints(info, own_share(names)))
    own_files = own_share(sorted(info.files))
    _refuse(integrity.damage(info.directory, info.files, own_files), advice=integrity.ADVICE)
    metadata = on_first_rank(lambda: read_metadata(info.directory))
    _refuse(check_pickles(info.directory, metadata, own_files))
    return metadata


def _trust_complaints(info: CheckpointInfo, names: Sequence[str]) -> list[str]:
    try:
        integrity.check_entries(info.directory, names, [*info.files, INFO])
    except CheckpointError as error:
        return [str(error).removesuffix(".")]
    except OSError as error:  # it was removed after it was listed
        return [f"{error.filename} cannot be looked at: {error.strerror}"]
    return []


def _refuse(own_complaints: list[str], *, advice: str = "") -> None:
    """Raise CheckpointError on all ranks if any rank has complaints, with `advice` where they do not say what to do. Collective."""
    found = complaints_of_all(own_complaints)
    if found:
        more = f" ({len(found) - _SHOWN} more.)" if len(found) > _SHOWN else ""
        raise CheckpointError("; ".join(found[:_SHOWN]) + f".{more} {advice}".rstrip())
