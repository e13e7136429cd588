"""Ranks of a thousand and of sixteen thousand, one at a time: process groups, bytes, and what all of them together save."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from megatron_iwsft.testing import run_distributed

pytestmark = pytest.mark.parallel

WORLDS = (1024, 16384)
MODELS = ("Qwen2.5-32B", "Llama-3.1-70B", "Llama-3.1-405B", "Qwen3-235B-A22B")


def list_ranks_once() -> None:
    """Have Megatron-Core list the ranks of the groups of a layout once. Most of the time of a fake rank is that."""
    from megatron.core import parallel_state

    listed = functools.cache(parallel_state.generate_masked_orthogonal_rank_groups)
    parallel_state.generate_masked_orthogonal_rank_groups = lambda world_size, sizes, mask: listed(
        world_size, tuple(sizes), tuple(mask)
    )


def described_ranks(platform: Any) -> dict[str, Any]:
    """Every model at every world size: group calls, bytes held, and bytes estimated, of one rank."""
    list_ranks_once()
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.model.memory import cost, stage_parameters
    from megatron_iwsft.testing.fake_world import DEGREES, FakeRank, geometry

    found = {}
    for world in WORLDS:
        for model in MODELS:
            arch, layout = geometry(model), ParallelLayout.for_world(world, **DEGREES[model])
            by_stage = [sum(parameters) for parameters in stage_parameters(arch, layout)]
            fullest = by_stage.index(max(by_stage)) * layout.ranks_per_stage + layout.ranks_per_stage // 3
            rank = FakeRank.build(arch, layout, fullest)
            printed = cost(arch, layout, seq_length=4096, micro_batch_size=1, micro_batches=8)  # by `iwsft layouts`
            found[f"{model} {world}"] = {
                "groups": vars(rank.groups),
                "held": rank.bytes_held(),
                "estimated": (printed.parameters, printed.gradients, printed.optimizer),
                "place": (rank.parallel.pp.rank(), rank.parallel.dp.rank()) == layout.place_of(fullest),
            }
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[str, Any]:
    return run_distributed(described_ranks, 1)[0]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_are_as_estimated(model: str, world: int, ranks: dict[str, Any]) -> None:
    found = ranks[f"{model} {world}"]
    assert found["held"][:2] == found["estimated"][:2]
    # The optimizer's share is of buffers, which are padded to the number of ranks.
    assert found["held"][2] == pytest.approx(found["estimated"][2], rel=0.01)
    assert found["place"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", MODELS)
def test_groups_are_few_and_none_is_gloos(model: str, world: int, ranks: dict[str, Any]) -> None:
    groups = ranks[f"{model} {world}"]["groups"]
    assert groups["gloo"] == 0
    assert groups["calls"] <= 8 * world, "each rank takes part in the creation of all groups"
    assert len(groups["sizes"]) <= 40


# With fewer layers and experts; the layouts of 64 and of 1,024 ranks.
PLANNED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Qwen2.5-32B": (
        dict(num_hidden_layers=2),
        dict(tensor=4, sequence=True, pipeline=2, context=2),
        dict(tensor=8, sequence=True),
    ),
    "Qwen3-235B-A22B": (
        dict(num_hidden_layers=2, num_experts=32),
        dict(tensor=4, sequence=True, pipeline=2, context=2, expert=8),
        dict(tensor=4, sequence=True, expert=16),
    ),
}


def plans_of_all(platform: Any) -> dict[str, Any]:
    """Of every model the plans of 64 ranks, each built as a whole; and of 1,024, one built for each place in the model."""
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.testing.fake_world import FakeRank, geometry, global_metadata, save_plan

    list_ranks_once()
    found: dict[str, Any] = {}
    for model, (changes, degrees_of_64, degrees_of_1024) in PLANNED.items():
        arch, small = geometry(model, **changes), ParallelLayout.for_world(64, **degrees_of_64)
        plans, derived_wrongly, written, experts = [], [], [], []
        for number in range(64):
            rank = FakeRank.build(arch, small, number)
            state = rank.saved()
            plans.append(save_plan(state))
            written.append(_model_bytes(state))
            experts.append(_experts(plans[-1]))
            if number in (0, 5, 63):
                derived = save_plan(rank.saved(rank.parallel.dp_cp.rank()))
                if sorted(map(repr, derived.items)) != sorted(map(repr, plans[-1].items)):
                    derived_wrongly.append(number)
        tensors = len(global_metadata(plans).state_dict_metadata)
        found[model] = {"64": tensors, "model bytes": written, "experts": experts, "derived wrongly": derived_wrongly}

        large = ParallelLayout.for_world(1024, **degrees_of_1024)
        plans, parts = [], set[int]()
        places = math.lcm(large.tensor, large.expert)
        for place in range(places):
            rank = FakeRank.build(arch, large, place)
            same = range(rank.parallel.dp_cp.rank(), large.data, places // large.tensor)
            for state in map(rank.saved, same):
                plans.append(save_plan(state))
                parts |= set(_model_bytes(state))
        found[model] |= {"plans": len(plans), "1024": len(global_metadata(plans).state_dict_metadata), "parts": parts}
        try:
            global_metadata(plans[:-1])
            found[model]["incomplete"] = "accepted"
        except (ValueError, RuntimeError) as error:
            found[model]["incomplete"] = str(error)
    return found


def _model_bytes(state: dict[str, Any]) -> tuple[int, int]:
    """Bytes of weights that a rank writes: of experts, and of the rest."""
    from megatron_iwsft.testing.fake_world import written_tensors

    weights = written_tensors({k: v for k, v in state.items() if k != "optimizer"})
    experts = sum(t.data.nbytes for t in weights if ".experts." in t.key)
    return experts, sum(t.data.nbytes for t in weights) - experts


def _experts(plan: Any) -> set[int]:
    """The experts of which a rank writes weights or optimizer states: the first coordinate of their tensors."""
    return {item.index.offset[0] for item in plan.items if ".experts." in item.index.fqn}


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    return run_distributed(plans_of_all, 1)[0]


@pytest.mark.parametrize("model", PLANNED)
def test_the_plans_of_all_ranks_cover_every_tensor_once(model: str, plans: dict[str, Any]) -> None:
    found = plans[model]
    # Parameters, and three states of each in the optimizer.
    assert found["64"] == found["1024"] and found["64"] % 4 == 0
    assert found["plans"] == 1024
    assert found["incomplete"] != "accepted", "a missing rank is noticed"


@pytest.mark.parametrize("model", PLANNED)
def test_a_derived_plan_is_the_one_that_a_rank_makes(model: str, plans: dict[str, Any]) -> None:
    assert plans[model]["derived wrongly"] == []


@pytest.mark.parametrize("model", PLANNED)
def test_weights_are_written_by_all_ranks_alike(model: str, plans: dict[str, Any]) -> None:
    written = torch.tensor(plans[model]["model bytes"], dtype=torch.float64)
    experts, rest = written[:, 0].view(2, 32), written[:, 1].view(2, 8, 4)  # pipeline; data and context; tensor
    for stage in (*experts, *rest):
        assert stage.max() <= 1.02 * stage.mean()


@pytest.mark.parametrize("model", PLANNED)
def test_of_many_replicas_only_some_write_weights(model: str, plans: dict[str, Any]) -> None:
    # Nothing, or 32 MiB and more, cut at a row: whoever loads them opens no more files of a larger world.
    assert 0 in plans[model]["parts"]
    assert min(plans[model]["parts"] - {0}) > 0.99 * 2**25


def test_experts_are_written_by_ranks_that_hold_them(plans: dict[str, Any]) -> None:
    experts = plans["Qwen3-235B-A22B"]["experts"]
    for holder in range(8):  # 32 experts over 8 ranks, which are neighbours within a pipeline stage
        assert set().union(*experts[holder::8]) == set(range(4 * holder, 4 * (holder + 1)))
