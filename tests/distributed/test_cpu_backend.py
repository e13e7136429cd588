"""What a process on CPU does in place of CUDA, and what it does without."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.distributed.spawn import run_job
from megatron_iwsft.testing import run_distributed

pytestmark = pytest.mark.parallel


def threads_of_groups(platform: Any) -> tuple[int, list[float]]:
    """(threads that four more groups add, means of what is summed over them at the same time)."""
    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group(backend="gloo") for _ in range(4)]
    values = [torch.full((5000,), float(i + platform.rank)) for i in range(len(groups))]
    works = [dist.all_reduce(v, group=g, async_op=True) for v, g in zip(values, groups, strict=True)]
    for work in reversed(works):
        work.wait()
    added = len(os.listdir("/proc/self/task")) - before
    for group in groups:
        dist.destroy_process_group(group)
    return added, [v.mean().item() for v in values]


def test_a_group_adds_one_thread() -> None:
    for added, means in run_distributed(threads_of_groups, 2):
        assert added == 4
        assert means == [1.0, 3.0, 5.0, 7.0]


def transfers(platform: Any) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """(torch's operations by which gradients are reduced and parameters gathered, the reduced gradient, the parameter)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    platform.parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    module = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.constant_(module.weight, 1.0 + platform.rank)
    chunk = DistributedDataParallel(config, ddp, module)
    module.weight.main_grad.fill_(2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        chunk.finish_grad_sync()
        chunk.start_param_sync(force_sync=True)
    names = {event.key for event in profile.key_averages() if event.key.startswith("c10d::")}
    return sorted(names), module.weight.main_grad.clone(), module.weight.detach().clone()


def test_a_process_alone_transfers_nothing() -> None:
    names, gradient, weight = run_job(transfers, 1)[0]
    assert names == []
    assert (gradient == 2.0).all() and (weight == 1.0).all()
    assert [len(names) for names, _, _ in run_job(transfers, 2)] == [2, 2]


def devices_and_modules(platform: Any) -> tuple[set[str], list[str], list[str]]:
    """(devices of tensors that were asked for on CUDA, their type names, slow modules that were imported all the same)."""
    cuda = torch.device("cuda", 3)
    x = torch.ones(2, device="cuda")
    tensors = [x, torch.tensor([1.0], device=cuda), torch.zeros_like(x, device=cuda), x.new_empty(3, device="cuda:1")]
    tensors += [
        x.to("cuda"),
        x.to(device=cuda),
        x.to(cuda, torch.float64),
        x.cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
    parameter = torch.nn.Parameter(x.clone())
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.compile(devices_and_modules) is devices_and_modules
    assert torch.allclose(parameter, torch.tensor(0.5))
    names = [t.type() for t in (x, x.bfloat16(), x.double(), x.long())]
    return (
        {str(t.device) for t in tensors},
        names,
        [m for m in ("torch._dynamo", "torch._inductor", "wandb") if m in sys.modules],
    )


def test_cuda_is_answered_by_the_cpu_and_what_starts_slowly_is_not_imported() -> None:
    devices, names, slow = run_job(devices_and_modules, 1)[0]
    assert devices == {"cpu"}
    assert names == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.DoubleTensor",
        "torch.LongTensor",
    ]
    assert slow == []
