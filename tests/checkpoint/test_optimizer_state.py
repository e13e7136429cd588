"""Optimizer states saved and loaded at many layouts, compared with those that Megatron-Core gathers for its own format."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.load import load
from megatron_iwsft.checkpoint.optimizer_state import boxes
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.tensors import CheckpointTensors
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
from tests.support import tiny

# The first saves what the others load; widths are such that data-parallel ranges begin and end within rows.
LAYOUTS = {
    "qwen2": [
        dict(),  # data parallel 4
        dict(tensor=2),
        dict(pipeline=2, virtual_pipeline=2),
        dict(context=2),
        dict(tensor=2, pipeline=2),
    ],
    "qwen3_moe": [dict(), dict(expert=2), dict(tensor=2), dict(tensor=2, expert=4), dict(pipeline=2, expert=2)],
}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)
SAVED = Optimizer()
LOADED = Optimizer(lr=5e-2, betas=[0.5, 0.6])  # settings that are not state come from the config
UPDATES = 7


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 4, 5), (2, 1, 3, 2)])
def test_boxes_cover_a_range_in_order(shape: tuple[int, ...]) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    for start, end in product(range(whole.size + 1), repeat=2):
        found = list(boxes(shape, start, end))
        of_boxes = [
            whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] for offset, sizes in found
        ]
        assert [i for box in of_boxes for i in box.flatten()] == list(range(start, end))
        assert len(found) <= 2 * len(shape) - 1


def distinct_states(optimizer: Any, tensor_rank: int) -> None:
    """Fill every state with random numbers that depend on the parameter and the position in it."""
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            held = part._get_model_param_range_map(parameter)["param"]
            sharded = getattr(parameter, "tensor_model_parallel", False)
            for name, state in part._get_main_param_and_optimizer_states(parameter).items():
                if name == "step":
                    state.fill_(UPDATES)
                else:
                    seed = crc32(f"{part._param_name(parameter)} {name} {held.start} {tensor_rank * sharded}".encode())
                    state.data.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(seed)))


def gathered(optimizer: Any, chunks: list[Any]) -> list[Any]:
    """All of this rank's optimizer states as Megatron-Core gathers them: `ShardedTensor`s in the shape of their parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    metadata = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
    models = {
        f"{i}.{name}": entry
        for i, chunk in enumerate(chunks)
        for name, entry in chunk.sharded_state_dict(metadata=metadata).items()
    }
    out: list[Any] = []
    for part in optimizer.chained_optimizers:
        state = part.sharded_param_state_fully_reshardable(models, False, metadata)
        apply_factories(state)
        out += nested_values(state)
    return out


def wrong_states(optimizer: Any, chunks: list[Any], directory: Path) -> list[str]:
    """Names of a checkpoint's states that differ from those that Megatron-Core gathers."""
    stored = CheckpointTensors(directory)
    entries = gathered(optimizer, chunks)
    assert len(entries) > 30
    return [e.key for e in entries if not torch.equal(stored.read(e.key)[e.global_slice()], e.data)]


def different(a: Path, b: Path) -> list[str]:
    """Names of the optimizer states that differ between two checkpoints."""
    names = [set(FileSystemReader(str(path)).read_metadata().state_dict_metadata) for path in (a, b)]
    states = {name for name in names[0] | names[1] if name.startswith("optimizer.")}
    assert len(states) > 30
    both = (CheckpointTensors(path) for path in (a, b))
    read_a, read_b = (stored.read for stored in both)
    return [n for n in states if n not in names[0] & names[1] or not torch.equal(read_a(n), read_b(n))]


def settings_and_counts(optimizer: Any) -> set[Any]:
    parts = [part.optimizer for part in optimizer.chained_optimizers]
    settings = {(g["max_lr"], *g["betas"]) for inner in parts for g in inner.param_groups}
    return settings | {float(values["step"]) for inner in parts for values in inner.state.values()}


def save_and_load(platform: Any, tmp: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family, layouts in LAYOUTS.items():
        more = EXPERTS if family == "qwen3_moe" else dict(tie_word_embeddings=True)
        config = tiny.model_config(family, hidden_size=72, num_attention_heads=4, head_dim=18, **more)
        architecture = Architecture.from_hf(config, where="test")
        writer = CheckpointWriter(tmp / family, architecture)

        def build(layout: dict[str, int], settings: Optimizer, architecture: Architecture = architecture):
            parallel = platform.parallel(**layout, sequence="tensor" in layout)
            chunks = build_model(architecture, parallel, platform, ModelSettings())
            load_weights(chunks, RandomInit(architecture, 0), parallel)
            chunks = wrap_for_gradients(chunks, settings)
            return parallel, chunks, build_optimizer(chunks, settings, torch.float32)

        parallel, chunks, optimizer = build(layouts[0], SAVED)
        fresh = writer.save(TrainState(chunks, optimizer, step=0))  # creates the optimizer's states
        distinct_states(optimizer, parallel.tp.rank())
        first = writer.save(TrainState(chunks, optimizer, step=1))
        found[f"{family} saved"] = wrong_states(optimizer, chunks, first)
        for layout in layouts[1:]:
            _, chunks, optimizer = build(layout, LOADED)
            load(CheckpointInfo.read(first), TrainState(chunks, optimizer))
            found[f"{family} {layout} loaded"] = wrong_states(optimizer, chunks, first)
            found[f"{family} {layout} not states"] = settings_and_counts(optimizer) ^ {(5e-2, 0.5, 0.6), UPDATES}
            again = writer.save(TrainState(chunks, optimizer, step=2))
            found[f"{family} {layout} saved"] = different(first, again)
        # An optimizer that is not distributed has the same states, unsharded.
        _, chunks, optimizer = build(layouts[-1], LOADED.model_copy(update={"distributed": False}))
        load(CheckpointInfo.read(first), TrainState(chunks, optimizer))
        found[f"{family} not distributed"] = different(first, writer.save(TrainState(chunks, optimizer, step=2)))
        load(CheckpointInfo.read(fresh), TrainState(chunks, optimizer))  # from before the first update
        found[f"{family} fresh"] = settings_and_counts(optimizer) ^ {(5e-2, 0.5, 0.6), 0}
    return found


@pytest.mark.parallel
@pytest.mark.exhaustive
def test_states_equal_those_that_megatron_core_gathers(tmp_path: Path) -> None:
    ranks = run_distributed(save_and_load, 4, tmp_path)
    assert len(ranks[0]) == sum(3 * len(layouts) for layouts in LAYOUTS.values())
    for found in ranks:
        assert {case: wrong for case, wrong in found.items() if wrong} == {}
