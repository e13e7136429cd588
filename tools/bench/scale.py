"""What grows with the number of ranks: tools/bench/scale.py [--ranks 64 256 1024 4096 16384] [--imports] [--host-work]

One process is the first rank of each world in turn, with torch's `fake` process group and parameters without memory
(megatron_iwsft/testing/fake_world.py). Group calls, seconds, memory, files and bytes are measured in it; plans of the other ranks are
derived from its own where the table says so. Nothing is sent: what a network or a file system adds is not in these numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_iwsft.utils.cli import run_command

_PLANNED = 1024  # `.metadata` is derived from the plans of so many ranks; of larger worlds, computed from those


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument(
        "--model", default="Qwen2.5-32B", help="of megatron_iwsft.testing.fake_world.GEOMETRIES (dense)"
    )
    parser.add_argument(
        "--degrees", nargs="+", metavar="NAME=N", help="in place of the model's usual layout, such as tensor=2"
    )
    parser.add_argument("--imports", action="store_true", help="also count the files that a rank's imports open")
    parser.add_argument("--host-work", action="store_true", help="also time work over a global batch of 4,096 packs")
    args = parser.parse_args()

    from megatron_iwsft.testing import run_distributed

    degrees = args.degrees and {name: int(n) for name, n in (entry.split("=") for entry in args.degrees)}
    rows = run_distributed(measure, 1, args.model, args.ranks, degrees)[0]
    names = list(dict.fromkeys(name for row in rows for name in row))
    width = max(map(len, names))
    print(f"{args.model}, {rows[0].pop('layout')}, the rest data parallel; the first rank of a world of")
    for name in names:
        if name != "layout":
            print(f"{name:{width}} " + " ".join(f"{row.get(name, '–')!s:>12}" for row in rows))
    if args.imports:
        print(f"files opened by a rank's imports: {opened_by_imports():,}")
    if args.host_work:
        host_work()


def measure(platform: Any, model: str, worlds: list[int], degrees: dict[str, int] | None) -> list[dict[str, Any]]:
    """The table's columns, one per world size."""
    return [of_world(model, world, degrees) for world in worlds]


def of_world(model: str, world: int, degrees: dict[str, int] | None) -> dict[str, Any]:
    from megatron_iwsft.distributed.descriptors import CONNECTIONS_PER_RANK
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.testing.fake_world import DEGREES, FakeRank, become, geometry, written_tensors

    layout = ParallelLayout.for_world(world, **(degrees or DEGREES[model]))
    platform, groups = become(0, world)
    began = time.perf_counter()
    platform.parallel(layout)
    seconds = time.perf_counter() - began
    rank = FakeRank.build(geometry(model), layout, 0)
    began = time.perf_counter()
    state = rank.saved()
    planned = time.perf_counter() - began
    weights = [_weights(rank.saved(place)) for place in {0, 1, layout.data // 2, rank.parallel.dp_cp.size() - 1}]
    return {
        "layout": layout.describe().rpartition(" × ")[0],
        "ranks": f"{world:,}",
        "calls of new_group": f"{groups.calls:,}",
        "  for gloo": groups.gloo,
        "  largest group but the world": max(size for size in groups.sizes if size < world),
        "  s in making them": f"{seconds:.2f}",
        "groups this rank is in": len(groups.sizes),
        **of_checkpoint(world),
        "saving: tensors this rank writes": len(written_tensors(state)),
        "  s to list them": f"{planned:.2f}",
        "  GB of weights, busiest rank, not spread (before)": f"{_weights(rank.saved(0, spread=False)) / 1e9:.3f}",
        "  GB of weights, busiest rank": f"{max(weights) / 1e9:.3f}",
        **metadata_of_all(rank, world),
        "files of a checkpoint (computed)": f"{2 * world:,}",
        "connections to the store (computed)": f"{CONNECTIONS_PER_RANK * world:,}",
        "resident memory, MiB": round(_resident() / 2**20),
    }


def _weights(state: dict[str, Any]) -> int:
    from megatron_iwsft.testing.fake_world import written_tensors

    return sum(t.data.nbytes for t in written_tensors({k: v for k, v in state.items() if k != "optimizer"}))


def metadata_of_all(rank: Any, world: int) -> dict[str, str]:
    """MB of `.metadata`, without file offsets: of the ranks with this one's place in the model, times the number of places.

    Of these ranks all, or as many as there are in a world of _PLANNED, at equal distances. Before: the weights not spread, and each
    rank's plan beside the blocks.
    """
    from megatron_iwsft.testing.fake_world import save_plan

    looked_at = range(0, rank.parallel.dp_cp.size(), max(1, world // _PLANNED))
    found = {}
    for spread in (False, True):
        plans = [save_plan(rank.saved(replica, spread=spread)) for replica in looked_at]
        blocks = [(item.index, item.tensor_data.chunk) for plan in plans for item in plan.items]
        size = world // len(looked_at) * len(pickle.dumps(blocks if spread else (blocks, plans)))
        of = "derived" if world <= _PLANNED else "computed"
        found[f"  MB of .metadata, {of}{'' if spread else ' (before)'}"] = f"{size / 1e6:.1f}"
    return found


def of_checkpoint(world: int) -> dict[str, Any]:
    """What the first rank touches of a checkpoint of as many ranks, with almost empty files: naming its weights, and verifying it."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    from megatron_iwsft.checkpoint.info import CheckpointInfo
    from megatron_iwsft.checkpoint.initial_weights import InitialWeights
    from megatron_iwsft.checkpoint.integrity import FileSum, file_sum
    from megatron_iwsft.checkpoint.load import verify
    from megatron_iwsft.checkpoint.names import INFO
    from megatron_iwsft.config.schema import Model
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.testing.fake_world import geometry

    with tempfile.TemporaryDirectory() as name:
        directory, metadata = Path(name) / "step-00000001", Metadata({}, storage_data={})
        directory.mkdir()
        torch.save([{"state": 0}], directory / "__0_0.distcp")
        content = (directory / "__0_0.distcp").read_bytes()
        for rank in range(world):
            (directory / f"__{rank}_0.distcp").write_bytes(content)
            (directory / f"__{rank}_1.distcp").write_bytes(b"")
            key = f"random/shard_{rank}_{world}"
            metadata.state_dict_metadata[key] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(key)] = _StorageInfo(f"__{rank}_0.distcp", 0, len(content))
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        same: dict[int, FileSum] = {k: file_sum(directory / f"__0_{k}.distcp") for k in (0, 1)}
        files = {f"__{rank}_{k}.distcp": same[k] for rank in range(world) for k in (0, 1)}
        files[".metadata"] = file_sum(directory / ".metadata")
        info = CheckpointInfo(
            directory, 1, geometry("Qwen2.5-32B"), {}, ParallelLayout(data=world), None, {}, None, {}, files
        )
        (directory / INFO).write_text(info.to_text())
        (directory / INFO).chmod(0o600)
        named, checked = Counter[str](), Counter[str]()
        with _Watched(directory, named):
            assert InitialWeights(Model(checkpoint=str(directory)), 0).fingerprint
        with _Watched(directory, checked):
            verify(info)
    return {
        "naming a checkpoint's weights: files opened": f"{named['opened']:,}",
        "  bytes of iwsft.json": f"{named['iwsft.json']:,}",
        "verifying a checkpoint: files opened": checked["opened"],
        "  inodes looked at": f"{checked['inodes']:,}",
        "  bytes of .metadata": f"{checked['.metadata']:,}",
    }


class _Watched:
    """Count files opened below a directory, their bytes, and inodes looked at, in the block."""

    def __init__(self, directory: Path, touched: Counter[str]) -> None:
        self._prefix, self._touched, self._on = str(directory), touched, False
        self._originals = os.lstat, os.stat
        sys.addaudithook(self._opened)

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self._on and isinstance(args[0], (str, os.PathLike)):
            path = str(args[0])
            if path.startswith(self._prefix):
                self._touched["opened"] += 1
                self._touched[Path(path).name] = self._originals[1](path).st_size

    def __enter__(self) -> None:
        def counted(look: Any) -> Any:
            def inode(path: Any, *args: Any, **kwargs: Any) -> Any:
                self._touched["inodes"] += str(path).startswith(self._prefix)
                return look(path, *args, **kwargs)

            return inode

        self._on = True
        os.lstat, os.stat = map(counted, self._originals)

    def __exit__(self, *error: object) -> None:
        self._on = False
        os.lstat, os.stat = self._originals


def opened_by_imports() -> int:
    """Files that a new process opens to import the trainer."""
    script = (
        "import sys, json; n = [0]\n"
        "sys.addaudithook(lambda event, args: n.__setitem__(0, n[0] + (event == 'open')))\n"
        "import megatron_iwsft.distributed.context as c; c.prepare('cpu')\n"
        "import megatron_iwsft.train.trainer; print(json.dumps(n[0]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def host_work(packs: int = 4096, seq_length: int = 32768) -> None:
    """Print CPU ms per step of work over a whole global batch of short trajectories."""
    import numpy as np

    from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
    from megatron_iwsft.data.sampler import Quality, Sampler
    from megatron_iwsft.model.flops import multiply_adds, training_flops
    from megatron_iwsft.testing.fake_world import geometry

    rng, arch = np.random.default_rng(0), geometry("Qwen2.5-32B")
    lengths = rng.gamma(7.5, 26, max(250 * packs, 100_000)).clip(40, 700).astype(np.int32)
    options: dict[str, Any] = dict(seq_length=seq_length, packing="best_fit", global_batch_size=packs)
    sampler = Sampler(lengths, np.ones(len(lengths)), quality=Quality("none"), seed=1, **options)
    batch = sampler.packs_at(0)
    shapes = [RowShape.of(tensor=8, context=2, row_length=seq_length, packed_multiple=multiple) for multiple in (4, 1)]
    costs = partial(multiply_adds, arch)

    def one_by_one() -> np.ndarray:
        """The costs of the packs as before they were summed together: an index, a padding and a sum per pack, then np.add.at."""
        sizes = [shapes[0].padded(lengths[pack]) for pack in batch]
        capacity = shapes[0].fit(max(int(pack.sum()) for pack in sizes))
        joined, pack_of = np.concatenate(sizes).astype(np.int64), np.repeat(np.arange(packs), list(map(len, sizes)))
        tokens, out = np.zeros((2, packs), np.int64)
        np.add.at(tokens, pack_of, joined)
        np.add.at(out, pack_of, costs(joined))
        longest = shapes[0].padded(lengths.max(keepdims=True).astype(np.int64))  # filler is cut into pieces of it
        pieces, rest = np.divmod(np.maximum(capacity - tokens, 0), longest)
        return out + pieces * costs(longest) + costs(rest)

    corpus: Any = SimpleNamespace(lengths=lengths)
    builder = BatchBuilder(corpus, sampler, shapes[0], micro_batch_size=1, data_size=256, costs=costs)
    assert np.array_equal(builder.costs_of(batch, costs), one_by_one())
    work = {
        "costs of the packs, pack by pack (before)": one_by_one,
        "costs of the packs": lambda: builder.costs_of(batch, costs),
        "dealing the packs to 256 data-parallel ranks, costs included": lambda: builder.dealt(batch),
        "length of the rows, where packing ensures it": lambda: shapes[0].longest(lengths, batch, 1),
        "length of the rows, otherwise": lambda: shapes[1].longest(lengths, batch, 1),
        "tokens and FLOPs, on the first rank": lambda: training_flops(arch, lengths[np.concatenate(batch)], 1),
    }
    for what, call in work.items():
        call()
        began = time.process_time()
        for _ in range(5):
            call()
        print(f"{what}: {(time.process_time() - began) / 5 * 1e3:.1f} ms per step of {packs:,} packs")
    few, options["global_batch_size"] = lengths[:100_000], 512
    for what, multiple in {"tokens (before)": 1, "padded lengths": 16}.items():
        sampler = Sampler(few, np.ones(len(few)), quality=Quality("none"), seed=1, pad_to=multiple, **options)
        shape = RowShape.of(tensor=1, context=8, row_length=seq_length, packed_multiple=multiple)
        longest = shape.fit(shape.longest(few, sampler.packs_at(0), 1))
        print(
            f"longest row at context-parallel degree 8, packed by {what}: {longest:,} tokens, seq_length {seq_length:,}"
        )


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run_command(main)
