"""Every private name or behaviour of Megatron-Core that the package relies on, in the installed version.

A failure says what changed; adapt `distributed/mcore_compat.py`, or the module that the test names.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iwsft.testing import run_distributed
from tests.support import tiny

pytestmark = pytest.mark.parallel


def built(platform: Any, *, distributed: bool = True, dtype: torch.dtype = torch.float32, **degrees: Any) -> Any:
    """(policy, wrapped chunks, optimizer) of a small mixture of experts."""
    from megatron_iwsft.config.schema import Optimizer
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients

    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=16)
    arch = Architecture.from_hf(tiny.model_config("qwen3_moe", num_hidden_layers=2, **experts), where="test")
    parallel = platform.parallel(**degrees)
    policy = build_model(arch, parallel, platform, ModelSettings(dtype=dtype))
    load_weights(policy, RandomInit(arch, 1), parallel)
    settings = Optimizer(lr=1e-2, clip_grad=0.5, distributed=distributed)
    chunks = wrap_for_gradients(policy, settings)
    return policy, chunks, build_optimizer(chunks, settings, dtype)


def fill_gradients(chunks: list[Any]) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for i, parameter in enumerate(chunk.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))


def update_both_ways(platform: Any, distributed: bool, dtype: torch.dtype) -> tuple[float, float, list[str]]:
    """(our gradient norm, Megatron-Core's, names of parameters that differ after our update and after its step)."""
    from megatron_iwsft.distributed.mcore_compat import prepare_gradients, update_parameters

    found = []
    for ours in (True, False):
        policy, chunks, optimizer = built(platform, distributed=distributed, dtype=dtype)
        fill_gradients(chunks)
        for chunk in chunks:
            chunk.finish_grad_sync()
        if ours:
            norm = prepare_gradients(optimizer)
            update_parameters(optimizer, norm)
        else:
            _, norm, _ = optimizer.step()
        found.append((float(norm), {n: p.detach().clone() for c in policy for n, p in c.named_parameters()}))
    (norm, mine), (expected, theirs) = found
    return norm, expected, [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [True, False])
def test_an_update_equals_megatron_cores_step(distributed: bool, dtype: torch.dtype) -> None:
    """`optimizer.prepare_grads`, `get_grad_norm`, `clip_grad_by_total_norm_fp32`, `step_with_ready_grads`."""
    for norm, expected, different in run_distributed(update_both_ways, 2, distributed, dtype):
        assert norm == expected and different == []
        assert norm > 0.5, "nothing was clipped"


def shard_facts(platform: Any, distributed: bool, dtype: torch.dtype) -> dict[str, Any]:
    from megatron_iwsft.distributed.mcore_compat import inner_optimizers, optimizer_shards

    policy, _, optimizer = built(platform, distributed=distributed, dtype=dtype)
    wanted = {id(p): p for chunk in policy for p in chunk.parameters()}
    shards = list(optimizer_shards(optimizer))
    return {
        "foreign": [s for s in shards if id(s.parameter) not in wanted],
        "covered": sum(s.end - s.start for s in shards),
        "wrong size": [s.end - s.start for s in shards if s.main.numel() != s.end - s.start],
        "wrong dtype": [s.main.dtype for s in shards if s.main.dtype != torch.float32],
        "wrong values": [
            1
            for s in shards
            if not torch.equal(s.main.flatten().to(dtype), s.parameter.detach().flatten()[s.start : s.end])
        ],
        "replicated": {s.replicated for s in shards},
        "parameters": sum(p.numel() for p in wanted.values()),
        "inner": len(inner_optimizers(optimizer)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [True, False])
def test_optimizer_shards_cover_the_parameters(distributed: bool, dtype: torch.dtype) -> None:
    """`model_param_gbuf_map`, `_get_model_param_range_map`, `model_param_group_index_map`, `float16_groups`."""
    ranks = run_distributed(shard_facts, 2, distributed, dtype)
    for facts in ranks:
        assert (
            not facts["foreign"] and not facts["wrong size"] and not facts["wrong dtype"] and not facts["wrong values"]
        )
        assert facts["replicated"] == {not distributed} and facts["inner"] >= 1
    parameters = ranks[0]["parameters"]
    assert [r["covered"] for r in ranks] == [parameters] * 2 if not distributed else True
    if distributed:
        assert sum(r["covered"] for r in ranks) == parameters


def names(platform: Any) -> dict[str, Any]:
    """For each private name that is set or read: whether it exists and is as expected."""
    from megatron.core import optimizer as optimizers
    from megatron.core.dist_checkpointing import save
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_iwsft.config.megatron import Megatron
    from megatron_iwsft.distributed.mcore_compat import (
        async_calls_queue,
        async_save_options,
        check_settings,
        write_results,
    )
    from megatron_iwsft.errors import ConfigError
    from megatron_iwsft.model.moe import BalancedRouter

    policy, chunks, _ = built(platform)
    found = {
        "filesystem_async._results_queue": hasattr(filesystem_async, "_results_queue"),
        "filesystem_async.mp": hasattr(filesystem_async, "mp"),
        "optimizers.Adam is torch's": optimizers.Adam is torch.optim.AdamW and optimizers.USING_PYTORCH_OPTIMIZER,
        "clip_grads.l2_norm_impl": hasattr(clip_grads, "l2_norm_impl"),
        "clip_grads.multi_tensor_scale_impl": hasattr(clip_grads, "multi_tensor_scale_impl"),
        "optimizer.multi_tensor_scale_impl": hasattr(optimizer, "multi_tensor_scale_impl"),
        "distrib_optimizer.HAVE_APEX_OR_TE": hasattr(distrib_optimizer, "HAVE_APEX_OR_TE"),
        "moe_utils.te_general_gemm is None": moe_utils.te_general_gemm is None,
        "random._get_cuda_rng_state": hasattr(megatron_random, "_get_cuda_rng_state"),
        "strategies.torch._get_filesystem_reader": hasattr(strategies, "_get_filesystem_reader"),
        "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks(writer, planned)": list(
            inspect.signature(strategies.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks).parameters
        )[1:3]
        == ["writer", "save_state_dict_ret"],
        "TorchDistSaveShardedStrategy(cached_metadata=)": "cached_metadata"
        in inspect.signature(strategies.TorchDistSaveShardedStrategy).parameters,
        "save(async_sharded_save=)": "async_sharded_save" in inspect.signature(save).parameters,
        "GPTModel.setup_embeddings_and_output_layer": callable(GPTModel.setup_embeddings_and_output_layer),
        "GPTModel.compute_language_model_loss(labels, logits)": list(
            inspect.signature(GPTModel.compute_language_model_loss).parameters
        )[:3]
        == ["self", "labels", "logits"],
        "TopKRouter.routing": callable(TopKRouter.routing),
        "the router spec is ours": isinstance(policy[0].decoder.layers[0].mlp.router, BalancedRouter),
        "DistributedDataParallel.start_param_sync(force_sync=)": "force_sync"
        in inspect.signature(chunks[0].start_param_sync).parameters,
        "DistributedDataParallel.scale_gradients": callable(chunks[0].scale_gradients),
        "main_grad": all(p.main_grad.dtype == torch.float32 for p in policy[0].parameters()),
    }
    check_settings(Megatron.model_fields)
    with pytest.raises(ConfigError, match=r"megatron\.another is no setting of the installed Megatron-Core"):
        check_settings(["another"])
    queue = async_calls_queue()
    found["AsyncCallsQueue"] = all(hasattr(queue, n) for n in ("schedule_async_request", "maybe_finalize_async_calls"))
    found["async_save_options"] = set(async_save_options()) <= set(inspect.signature(save).parameters)
    ours = write_results()
    # 0.16 calls it with an underscore.
    queue_of = getattr(filesystem_async, "get_write_results_queue", None) or filesystem_async._get_write_results_queue
    found["writers report to our queue"] = queue_of() is ours
    return found


def test_every_private_name_exists() -> None:
    assert [name for name, there in run_distributed(names, 1)[0].items() if not there] == []


def random_states_repeat(platform: Any) -> bool:
    from megatron_iwsft.distributed.mcore_compat import random_states, set_random_states

    platform.parallel(seed=5)
    states = random_states()
    first = torch.rand(3)
    set_random_states(states)
    return torch.equal(first, torch.rand(3)) and set(states) == {"torch", "device", "megatron"}


def test_random_states_can_be_saved_and_set() -> None:
    assert run_distributed(random_states_repeat, 1) == [True]


def events_of_a_save(platform: Any, directory: Path) -> list[str]:
    """What an asynchronous save does, in order: copying tensors to the host, waiting for the device, forking."""
    from megatron.core.dist_checkpointing import ShardedTensor, save
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer

    from megatron_iwsft.distributed.mcore_compat import (
        async_calls_queue,
        async_save_options,
        save_strategy,
        write_results,
    )

    platform.parallel()
    write_results()
    events: list[str] = []
    copy = Writer.preload_tensors

    def copying(buckets: Any, non_blocking: bool) -> Any:
        events.append("copy to pinned memory" if non_blocking else "copy")
        return copy(buckets, non_blocking)

    Writer.preload_tensors = staticmethod(copying)
    torch.cuda.synchronize = lambda *args: events.append("wait")
    os.register_at_fork(before=lambda: events.append("fork"))
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(8))}
    request = save(state, str(directory), save_strategy(), validate_access_integrity=False, **async_save_options())
    queue = async_calls_queue()
    queue.schedule_async_request(request)
    queue.maybe_finalize_async_calls(blocking=True)
    return events


def test_a_save_forks_after_its_tensors_are_on_the_host(tmp_path: Path) -> None:
    """A fork of a process that uses CUDA must not touch the device. `.to("cpu", non_blocking=True)` allocates pinned memory itself."""
    (events,) = run_distributed(events_of_a_save, 1, tmp_path)
    assert events[0] == "copy to pinned memory" and events.count("fork") == 1, events
    assert "wait" in events[: events.index("fork")], events


def test_optimizers_with_main_parameters_can_set_the_models() -> None:
    """`set_parameters_from_main` asks for the method, which optimizers in float32 lack."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    found = [
        hasattr(kind, "_copy_main_params_to_model_params")
        for kind in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
    ]
    assert found == [True, True, False]
