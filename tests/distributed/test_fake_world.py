"""Ranks of a thousand and of sixteen thousand, one at a time: process groups, bytes, and what all of them together save."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_iwsft.testing import run_distributed

pytestmark = pytest.mark.parallel

WORLDS = (1024, 16384)
MODELS = ("Qwen2.5-32B", "Llama-3.1-70B", "Llama-3.1-405B", "Qwen3-235B-A22B")


def described_ranks(platform: Any) -> dict[str, Any]:
    """Every model at every world size: group calls, bytes held, and bytes estimated, of one rank."""
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


def plans_of_all(platform: Any) -> dict[str, Any]:
    """The plans of 64 ranks, each built as a whole; and of 1,024, one built for each place in the model. With fewer layers."""
    from megatron_iwsft.distributed.parallel_layout import ParallelLayout
    from megatron_iwsft.testing.fake_world import FakeRank, geometry, global_metadata, save_plan

    found: dict[str, Any] = {}
    arch = geometry("Qwen2.5-32B", num_hidden_layers=2)
    small = ParallelLayout.for_world(64, tensor=4, sequence=True, pipeline=2, context=2)
    plans, derived_wrongly, written = [], [], []
    for number in range(64):
        rank = FakeRank.build(arch, small, number)
        state = rank.saved()
        plans.append(save_plan(state))
        written.append(_model_bytes(state))
        if number in (0, 5, 63):
            derived = save_plan(rank.saved(rank.parallel.dp_cp.rank()))
            if sorted(map(repr, derived.items)) != sorted(map(repr, plans[-1].items)):
                derived_wrongly.append(number)
    found["64"] = {"tensors": len(global_metadata(plans).state_dict_metadata), "model bytes": written}
    found["derived wrongly"] = derived_wrongly

    large = ParallelLayout.for_world(1024, tensor=8, sequence=True)
    plans = []
    for place in range(large.tensor):
        rank = FakeRank.build(arch, large, place)
        plans += [save_plan(rank.saved(data_rank)) for data_rank in range(large.data)]
    found["1024"] = {"plans": len(plans), "tensors": len(global_metadata(plans).state_dict_metadata)}
    try:
        global_metadata(plans[:-1])
        found["incomplete"] = "accepted"
    except (ValueError, RuntimeError) as error:
        found["incomplete"] = str(error)
    return found


def _model_bytes(state: dict[str, Any]) -> int:
    from megatron_iwsft.testing.fake_world import written_tensors

    return sum(t.data.nbytes for t in written_tensors({k: v for k, v in state.items() if k != "optimizer"}))


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    return run_distributed(plans_of_all, 1)[0]


def test_the_plans_of_all_ranks_cover_every_tensor_once(plans: dict[str, Any]) -> None:
    # Parameters, and three states of each in the optimizer.
    assert plans["64"]["tensors"] == plans["1024"]["tensors"] and plans["64"]["tensors"] % 4 == 0
    assert plans["1024"]["plans"] == 1024
    assert plans["incomplete"] != "accepted", "a missing rank is noticed"


def test_a_derived_plan_is_the_one_that_a_rank_makes(plans: dict[str, Any]) -> None:
    assert plans["derived wrongly"] == []


def test_weights_are_written_by_all_ranks_alike(plans: dict[str, Any]) -> None:
    written = torch.tensor(plans["64"]["model bytes"], dtype=torch.float64).view(
        2, 8, 4
    )  # pipeline, data and context, tensor
    for stage in written:
        assert stage.max() < 1.02 * stage.mean()
