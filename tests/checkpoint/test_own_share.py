"""What one rank reads and looks at when it verifies a checkpoint does not grow with the number of ranks.

One process is every rank in turn, with torch's `fake` process group: what the first rank broadcast is given to the others. The checkpoint
is as that many ranks write it: two files each, an object in one of them.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.integrity import check_entries, file_sum, names_below
from megatron_iwsft.checkpoint.load import verify
from megatron_iwsft.checkpoint.names import INFO
from megatron_iwsft.config.schema import Model
from megatron_iwsft.distributed.agreement import on_first_rank, own_share
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.check import CheckedRun
from megatron_iwsft.train.setup import reference_identities
from tests.support import tiny

pytestmark = pytest.mark.parallel

WORLDS = (4, 64, 1024)
Touched = dict[int, dict[str, list[str]]]


def checkpoint(directory: Path, ranks: int) -> CheckpointInfo:
    directory.mkdir()
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    for rank in range(ranks):
        torch.save([{"state": rank}], directory / f"__{rank}_0.distcp")
        (directory / f"__{rank}_1.distcp").write_bytes(bytes(1000))
        key = f"random/shard_{rank}_{ranks}"
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        size = (directory / f"__{rank}_0.distcp").stat().st_size
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(f"__{rank}_0.distcp", 0, size)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return CheckpointInfo(
        directory,
        step=1,
        architecture=Architecture.from_hf(tiny.model_config(), where="test"),
        config={},
        layout=ParallelLayout(data=ranks),
        template_hash=None,
        corpora={},
        objective=None,
        host={},
        files={path.name: file_sum(path) for path in directory.iterdir()},
    )


class EveryRank:
    """This process as each rank of a world in turn; the first one first."""

    def __init__(self, world_size: int, directory: Path) -> None:
        self.world_size, self._directory = world_size, directory
        self.rank = -1
        self.touched: Touched = defaultdict(lambda: defaultdict(list))
        self._sent: list[list[Any]] = []
        self._received = 0
        self._lstat, self._stat = os.lstat, os.stat

    def become(self, rank: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=self.world_size, store=FakeStore())
        self.rank, self._received = rank, 0

    def watch(self) -> None:
        """Give the first rank's broadcasts to the others; record which files are opened and which inodes looked at, by rank."""
        dist.broadcast_object_list = self._broadcast
        sys.addaudithook(lambda event, args: self._note("opened", args[0]) if event == "open" else None)

        def noted(look: Any) -> Any:
            def inode(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
                self._note("inodes", path)
                return look(path, *args, **kwargs)

            return inode

        os.lstat, os.stat = noted(self._lstat), noted(self._stat)

    def _broadcast(self, objects: list[Any], src: int) -> None:
        if self.rank == src:
            self._sent.append(pickle.loads(pickle.dumps(objects)))
        else:
            objects[:] = self._sent[self._received]
            self._received += 1

    def _note(self, kind: str, path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(self._directory)):
            self.touched[self.rank][kind].append(os.path.relpath(path, self._directory))


def name_as_every_rank(platform: Any, world_size: int, tmp: Path) -> dict[str, tuple[int, list[str]]]:
    """Bytes of the files that were opened, and their names: to name the weights, and as the first and another rank of a job for all."""
    dist.destroy_process_group()
    info = checkpoint(tmp / "step-00000001", world_size)
    (info.directory / INFO).write_text(info.to_text())
    world = EveryRank(world_size, info.directory)
    world.watch()
    weights = InitialWeights(Model(checkpoint=str(info.directory)), 0)
    assert weights.fingerprint
    found = {"fingerprint": world.touched[-1]["opened"]}
    corpus = SimpleNamespace(directory=tmp / "corpus", manifest={"template": None, "tokenizer": {"fingerprint": "t"}})
    run: Any = SimpleNamespace(
        mixture=SimpleNamespace(corpora=[corpus]),
        reference=weights,
        config=SimpleNamespace(precision=SimpleNamespace(described="fp32")),
    )
    run.reference_identity = partial(CheckedRun.reference_identity, run)
    run.reference_identities = partial(CheckedRun.reference_identities, run)
    identities = []
    for rank in (0, world_size - 1):
        world.become(rank)
        identities.append(reference_identities(run))
        found[f"identities on {'the first' if rank == 0 else 'another'} rank"] = world.touched[rank]["opened"]
    assert identities[0] == identities[1]
    return {
        what: (sum((info.directory / name).stat().st_size for name in names), sorted(set(names)))
        for what, names in found.items()
    }


@pytest.mark.parametrize("world_size", WORLDS)
def test_no_file_of_tensors_is_opened_to_name_weights(world_size: int, tmp_path: Path) -> None:
    (found,) = run_distributed(name_as_every_rank, 1, world_size, tmp_path)
    size, names = found.pop("fingerprint")
    # iwsft.json, at most twice: its format is looked at first. It has about 250 bytes per rank.
    assert names == [INFO] and size <= 2 * (10_000 + 400 * world_size)
    assert list(found.values()) == [(0, [])] * 2, "the name is known"


def read_as_every_rank_of_a_node(platform: Any, world_size: int, tmp: Path) -> dict[str, Any]:
    """Which local ranks open `iwsft.json` to name the weights, what they name them, and what they say of a damaged one."""
    info, node = checkpoint(tmp / "step-00000001", world_size), tmp / "node"
    (info.directory / INFO).write_text(info.to_text())
    node.mkdir()
    tempfile.tempdir = str(node)
    os.environ["LOCAL_WORLD_SIZE"] = "8"
    world = EveryRank(world_size, info.directory)
    world.watch()

    def weights(local_rank: int) -> str:
        world.rank, os.environ["LOCAL_RANK"] = local_rank, str(local_rank)
        try:
            return InitialWeights(Model(checkpoint=str(info.directory)), 0, once_per_node=True).fingerprint
        except CheckpointError as error:
            return str(error)

    names = [weights(rank) for rank in range(8)]
    opened = [world.touched[rank]["opened"].count(INFO) for rank in range(8)]
    left = [str(path) for path in node.rglob("*") if path.is_file()]
    weights(0)  # of a job that is then restarted
    (info.directory / INFO).write_text(info.to_text().replace('"step": 1', '"step": 2'))
    return {"names": names, "opened": opened, "left": left, "damaged": [weights(rank) for rank in range(8)]}


@pytest.mark.parametrize("world_size", WORLDS)
def test_one_process_per_node_reads_what_grows_with_the_ranks(world_size: int, tmp_path: Path) -> None:
    (found,) = run_distributed(read_as_every_rank_of_a_node, 1, world_size, tmp_path)
    assert found["opened"] == [1, 0, 0, 0, 0, 0, 0, 0] and found["left"] == []
    assert len(set(found["names"])) == 1 and len(found["names"][0]) == 64
    # All processes of the job end with the same message; a copy of an earlier file is not used.
    (message,) = set(found["damaged"])
    assert "iwsft.json is damaged: its checksum does not match. Use another checkpoint." in message


def verify_as_every_rank(platform: Any, world_size: int, tmp: Path) -> tuple[Touched, list[int], list[str]]:
    """What each of some ranks touched in verifying a checkpoint, how many entries it found there; and who refuses a foreign file."""
    dist.destroy_process_group()
    info = checkpoint(tmp / "step-00000001", world_size)
    ranks = range(world_size) if world_size <= 64 else (0, 1, world_size // 2, world_size - 1)
    world = EveryRank(world_size, info.directory)
    world.watch()
    found = []
    for rank in ranks:
        world.become(rank)
        found.append(len(verify(info).storage_data))
    touched = {rank: {kind: list(names) for kind, names in kinds.items()} for rank, kinds in world.touched.items()}
    (info.directory / "z-foreign").write_text("")
    world._sent.clear()
    refused = []
    for rank in ranks:
        world.become(rank)
        try:
            own = own_share(on_first_rank(lambda: names_below(info.directory)))
            check_entries(info.directory, own, [*info.files, INFO])
        except CheckpointError as error:
            refused.append(str(error))
    return touched, found, refused


@pytest.fixture(scope="module", params=WORLDS)
def verified(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp = tmp_path_factory.mktemp("share")
    return request.param, *run_distributed(verify_as_every_rank, 1, request.param, tmp)[0]


def test_the_shares_cover_everything(verified) -> None:
    world_size, touched, found, refused = verified
    assert set(found) == {world_size}
    if world_size > 64:
        return  # only some of the ranks were looked at
    files = {f"__{rank}_{k}.distcp" for rank in range(world_size) for k in (0, 1)} | {".metadata"}
    assert {name for kinds in touched.values() for name in kinds["inodes"]} >= {*files, "."}
    assert {name for kinds in touched.values() for name in kinds["opened"]} >= files
    assert len(refused) == 1 and "z-foreign is not part of the checkpoint" in refused[0]


def test_a_share_does_not_grow_with_the_ranks(verified) -> None:
    _, touched, _, _ = verified
    for rank, kinds in touched.items():
        own = set(kinds["opened"]) | set(kinds["inodes"])
        first = {".", ".metadata"} if rank == 0 else set()  # it lists the directory, and reads `.metadata` for all
        assert len(own - first) <= 6, f"rank {rank} touched {sorted(own)}"
        assert len(kinds["opened"]) <= 12 and len(kinds["inodes"]) <= 16
