"""Replicated weights are written by all ranks that hold them, each a part; the plan of the first saves is repeated."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_iwsft.checkpoint import spread
from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.load import load
from megatron_iwsft.checkpoint.pickles import read_metadata
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
from tests.support import tiny

pytestmark = pytest.mark.parallel

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16)
# world size → (family, its fields, degrees)
CASES: dict[int, tuple[str, dict[str, Any], dict[str, Any]]] = {
    2: ("qwen2", dict(tie_word_embeddings=True), dict()),
    4: ("qwen3_moe", EXPERTS, dict(tensor=2, sequence=True, expert=2)),
}


def optimizer_states(chunks: list[Any], optimizer: Any) -> dict[str, torch.Tensor]:
    """What this rank holds of each of the optimizer's states, by its place in the full one. Views of the optimizer's own memory."""
    states = TrainState(chunks, optimizer).sharded(random=False)["optimizer"]["states"]
    return {f"{box.key} at {box.global_offset}": box.data for box in nested_values(states)}


def save_three_times(platform: Any, family: str, fields: dict, degrees: dict, tmp: Path) -> dict[str, Any]:
    """Save steps 1 to 3, then load the last into other weights. Returns what each rank saw."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    spread._LEAST_BYTES = 1  # the model is small
    parallel = platform.parallel(**degrees)
    arch = Architecture.from_hf(tiny.model_config(family, num_hidden_layers=2, **fields), where="test")

    def build(seed: int) -> tuple[list[Any], Any]:
        chunks = build_model(arch, parallel, platform, ModelSettings())
        load_weights(chunks, RandomInit(arch, seed), parallel)
        wrapped = wrap_for_gradients(chunks, Optimizer())
        return chunks, build_optimizer(wrapped, Optimizer(), torch.float32)

    plans = Counter[int]()
    original = MCoreSavePlanner.create_global_plan

    def counted(self: Any, *args: Any) -> Any:
        plans[step] += 1
        return original(self, *args)

    MCoreSavePlanner.create_global_plan = counted
    chunks, optimizer = build(0)
    for place, state in optimizer_states(chunks, optimizer).items():
        if "exp_avg" in place:  # replicas have equal ones
            state.uniform_(1, 2, generator=torch.Generator().manual_seed(zlib.crc32(place.encode())))
    writer = CheckpointWriter(tmp / str(platform.world_size), arch, layout=parallel.layout)
    for step in (1, 2, 3):
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.add_(step)
        saved = writer.save(TrainState(chunks, optimizer, step=step))
    others, other_optimizer = build(1)
    load(CheckpointInfo.read(saved), TrainState(others, other_optimizer))
    mine, theirs = (
        {**dict(held[0].named_parameters()), **optimizer_states(held, of)}
        for held, of in ((chunks, optimizer), (others, other_optimizer))
    )
    assert any("exp_avg_sq" in name for name in mine) and mine.keys() == theirs.keys()
    return {
        "wrong": [name for name in mine if not torch.equal(mine[name], theirs[name])],
        "plans": [plans[step] for step in (1, 2, 3)],
        "saved": str(saved),
    }


@pytest.mark.parametrize("world_size", CASES)
def test_every_rank_writes_its_part_and_plans_are_repeated(world_size: int, tmp_path: Path) -> None:
    ranks = run_distributed(save_three_times, world_size, *CASES[world_size], tmp_path)
    assert [rank["wrong"] for rank in ranks] == [[]] * world_size
    assert ranks[0]["plans"] == [1, 1, 0], "the third save plans nothing"
    saved = Path(ranks[0]["saved"])
    written = Counter[str]()
    for file in saved.glob("*.distcp"):
        written[file.name.split("_")[2]] += file.stat().st_size
    assert len(written) == world_size
    assert max(written.values()) < 1.25 * min(written.values()), written
    assert "all_local_plans" not in vars(read_metadata(saved))
