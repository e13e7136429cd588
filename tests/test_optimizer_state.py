"""Optimizer states saved and loaded in pieces at many layouts, against what Megatron-Core gathers for its own format."""

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

from megatron_iwsft.checkpoint import CheckpointTensors, load
from megatron_iwsft.checkpoint_writer import CheckpointWriter
from megatron_iwsft.config import Optimizer
from megatron_iwsft.model.architecture import Architecture
from megatron_iwsft.model.build import ModelSettings, build_model, load_weights
from megatron_iwsft.model.hf import RandomInit
from megatron_iwsft.optim import build_optimizer, wrap_for_gradients
from megatron_iwsft.optimizer_state import boxes
from megatron_iwsft.testing import run_distributed
from tests import tiny

# The first saves what the others load; widths are such that data-parallel ranges begin and end within rows.
LAYOUTS = {
    "qwen2": [
        dict(),  # data parallel 4
        dict(tensor=2),
        dict(pipeline=2, virtual_pipeline=2),
        dict(context=2),
        dict(tensor=2, pipeline=2),
    ],
    "qwen3_moe": [dict(), dict(expert=2), dict(tensor=2, expert=4), dict(pipeline=2, expert=2)],
}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (3, 4, 5), (2, 1, 3, 2)])
def test_boxes_are_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    for start, end in product(range(whole.size + 1), repeat=2):
        found = list(boxes(shape, start, end))
        of_boxes = [
            whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] for offset, sizes in found
        ]
        assert [i for box in of_boxes for i in box.flatten()] == list(range(start, end))
        assert len(found) <= 2 * len(shape) - 1


def distinct_states(optimizer: Any, tensor_rank: int) -> None:
    """Fill every state with numbers that depend on the parameter and the place in it."""
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            held = part._get_model_param_range_map(parameter)["param"]
            sharded = getattr(parameter, "tensor_model_parallel", False)
            for name, state in part._get_main_param_and_optimizer_states(parameter).items():
                if name != "step":
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


def differences(optimizer: Any, chunks: list[Any], directory: Path) -> tuple[int, list[str]]:
    """How many states a checkpoint was compared in, and which of them are not those that Megatron-Core gathers."""
    stored = CheckpointTensors(directory)
    entries = gathered(optimizer, chunks)
    wrong = [e.key for e in entries if not torch.equal(stored.read(e.key)[e.global_slice()], e.data)]
    return len(entries), wrong


def save_and_load(platform: Any, tmp: Path) -> dict[str, tuple[int, list[str]]]:
    found = {}
    for family, layouts in LAYOUTS.items():
        more = EXPERTS if family == "qwen3_moe" else dict(tie_word_embeddings=True)
        config = tiny.model_config(family, hidden_size=72, num_attention_heads=4, head_dim=18, **more)
        architecture = Architecture.from_hf(config, where="test")
        for number, layout in enumerate(layouts):
            parallel = platform.parallel(**layout)
            chunks = build_model(
                architecture, parallel, platform, ModelSettings(sequence_parallel=parallel.tp.size() > 1)
            )
            load_weights(chunks, RandomInit(architecture, 0), parallel)
            chunks = wrap_for_gradients(chunks, Optimizer())
            optimizer = build_optimizer(chunks, Optimizer(), torch.float32)
            writer = CheckpointWriter(tmp / family, architecture, {}, {}, [])
            if number == 0:
                first = writer.save(0, chunks, optimizer=optimizer)  # which gives it its states
                distinct_states(optimizer, parallel.tp.rank())
                first = writer.save(1, chunks, optimizer=optimizer)
            else:
                load(first, chunks, optimizer=optimizer)
            found[f"{family} {layout}, loaded"] = differences(optimizer, chunks, first)
            again = writer.save(2, chunks, optimizer=optimizer)
            found[f"{family} {layout}, saved"] = differences(optimizer, chunks, again)
            if platform.rank == 0:
                states = [n for n in FileSystemReader(str(first)).read_metadata().state_dict_metadata if "exp_" in n]
                wrong = [n for n in states if not torch.equal(*(CheckpointTensors(d).read(n) for d in (first, again)))]
                found[f"{family} {layout}, again"] = len(states), wrong
    return found


@pytest.mark.parallel
def test_states_are_those_that_megatron_gathers(tmp_path: Path) -> None:
    ranks = run_distributed(save_and_load, 4, tmp_path)
    assert len(ranks[0]) == 3 * sum(map(len, LAYOUTS.values()))
    for found in ranks:
        assert [(case, wrong) for case, (_, wrong) in found.items() if wrong] == []
        assert min(count for count, _ in found.values()) > 30
