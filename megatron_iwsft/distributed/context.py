"""Devices and process groups: `start` joins the job, on CUDA with NCCL or on CPU with gloo.

Nothing else in the package asks Megatron-Core's `parallel_state` or decides on a device. `start`, once per process, gives a `Platform`;
`Platform.parallel` gives a `ParallelContext`, whose groups are passed to everything else.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.distributed.capabilities import (
    broken_transformer_engine,
    transformer_engine,
    untested_transformer_engine,
)
from megatron_iwsft.distributed.descriptors import raise_descriptor_limit
from megatron_iwsft.distributed.mcore_compat import destroy_model_parallel, import_megatron_core, quiet_megatron
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.distributed.stop_signals import die_with_parent, forks_die_with_their_parent
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.text import tell

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ParallelContext:
    """The process groups of one layout, and this rank's place in each.

    dp is data parallel alone; dp_cp spans data- and context-parallel ranks, over which losses and gradients are summed; ep, the
    expert-parallel group, spans ranks of tensor, context and data parallelism.
    """

    layout: ParallelLayout
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1


class Stopwatch:
    """Seconds between its creation and `stop`, as the device does the work: on CUDA between two points of the current stream."""

    def __init__(self, is_cuda: bool) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_cuda else []
        self._times = [0.0, 0.0]
        self._mark(0)

    def stop(self) -> None:
        """Does not wait for the device."""
        self._mark(1)

    def seconds(self) -> float:
        """After `stop`. Waits until the device has reached that point."""
        if not self._events:
            return self._times[1] - self._times[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._times[which] = time.perf_counter()


@dataclass(frozen=True)
class Platform:
    """This process's device and its place in the job."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_transformer_engine(self) -> bool:
        """Whether Transformer Engine's layers are used: on CUDA, where it can be imported."""
        return self.is_cuda and transformer_engine()[0] is not None

    def parallel(self, layout: ParallelLayout | None = None, *, seed: int = 0, **degrees: Any) -> ParallelContext:
        """Build the process groups of a layout. Collective over all ranks. Calling it again destroys the previous groups.

        layout   of exactly this job's processes; or instead
        degrees  of `ParallelLayout`; the rest is data parallel, all of it if none is given
        seed     starts torch's and Megatron-Core's tensor-parallel random states (only dropout would draw from them)

        Raises ConfigError if the layout breaks a rule or has another world size, TypeError if both layout and degrees are given.
        """
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        if layout is None:
            layout = ParallelLayout.for_world(self.world_size, **degrees)
        elif degrees:
            raise TypeError(f"parallel takes a layout or degrees, not both; found a layout and {', '.join(degrees)}")
        if layout.world_size != self.world_size:
            raise ConfigError(
                f"parallel: {layout.describe()} is a layout of {layout.world_size} processes; this job has {self.world_size}. "
                f"Start {layout.world_size}, or use ParallelLayout.for_world({self.world_size}, …)."
            )
        broken = layout.broken_rule()
        if broken:
            raise ConfigError(f"parallel: {broken}.")
        if parallel_state.model_parallel_is_initialized():
            destroy_model_parallel()
            gc.collect()  # models of the former layout are reference cycles and keep its groups, of which gloo's have threads that poll
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,  # experts are small: they are distributed, not split
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            create_gloo_process_groups=False,  # nobody uses them, and each is a full mesh of connections
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        return ParallelContext(
            layout=layout,
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            cp=parallel_state.get_context_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
            ep=parallel_state.get_expert_model_parallel_group(),
        )

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any rank. Collective: a maximum over all ranks."""
        return bool(self.largest(condition)[0])

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        out = torch.tensor(values, dtype=torch.int, device=self.device)
        dist.all_reduce(out, op=dist.ReduceOp.MAX)
        return out.tolist()

    def of_every_rank(self, *values: float) -> Tensor:
        """Every rank's values, float64 [world, len(values)] on the host. Collective: one all-gather, of 8 bytes per value."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        out = torch.empty(self.world_size * len(values), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(out, own)
        return out.view(self.world_size, len(values)).cpu()

    def stopwatch(self) -> Stopwatch:
        """A stopwatch of this device's work, started now."""
        return Stopwatch(self.is_cuda)

    def peak_memory(self) -> int:
        """Peak bytes held by this process: the allocator's on CUDA, the resident set on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def device_name(self) -> str:
        """The GPU's, as torch names it; empty on CPU."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else ""

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def chosen_device(device: DeviceChoice) -> str:
    """A config's choice, or the environment's `IWSFT_DEVICE=cpu|cuda` in place of auto. Raises ConfigError for any other value."""
    choice = os.environ.get("IWSFT_DEVICE", "auto") if device == "auto" else device
    if choice not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"IWSFT_DEVICE is {choice!r}; it can be auto, cpu or cuda.")
    return choice


def prepare(device: DeviceChoice = "auto") -> bool:
    """Make this process ready for the chosen device, before it imports Megatron-Core; returns whether that is CUDA.

    Importing Megatron-Core may import Transformer Engine, which asks the GPU for its capabilities: on CPU the stand-ins must be in
    place. Calling it again changes nothing. Raises ConfigError if the device is not available, or Transformer Engine
    is installed but broken or too old.
    """
    choice = chosen_device(device)
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError("CUDA was requested, but torch sees no GPU. Run on CPU with IWSFT_DEVICE=cpu.")
    quiet_megatron()
    # One hardware queue, so that kernels start in launch order: overlapped communication of tensor parallelism relies on it. CUDA
    # reads it when it is initialised, so it is set here, whatever launched this process.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda and choice != "cpu":
        _refuse_broken_transformer_engine()
        _mention_untested_transformer_engine()
        return True
    from megatron_iwsft.distributed import cpu_backend

    try:
        cpu_backend.install()
    except ConfigError:
        raise
    except Exception:
        # Megatron-Core does without a Transformer Engine that raises ImportError, and fails with any other error.
        _refuse_broken_transformer_engine()
        raise
    return False


def _refuse_broken_transformer_engine() -> None:
    why = broken_transformer_engine()
    if why:
        raise ConfigError(
            f"Transformer Engine is installed, but {why}. Install one that works (iwsft doctor shows what it needs), or uninstall it to "
            "train with layers in plain torch."
        )


@functools.cache
def _mention_untested_transformer_engine() -> None:
    """Once, on the first rank."""
    why = untested_transformer_engine()
    if why and os.environ.get("RANK", "0") == "0":
        tell(f"Transformer Engine {transformer_engine()[0]} is {why}.")


def start(device: DeviceChoice = "auto", *, timeout_s: float = 600.0, bind_device: bool | None = None) -> Platform:
    """Join the job that torchrun describes in the environment (or be a job of one process), on the chosen device.

    bind_device: tell NCCL this process's GPU now. Every process group is then split from the world's, in a call that all ranks make
    together: fast on one node, thousands of world-wide calls on a thousand ranks. None: on a single node only.

    Collective over all ranks. Raises ConfigError if the device is not available.
    """
    use_cuda = prepare(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # a killed torchrun leaves its workers running, and they leave the writers they have forked
        forks_die_with_their_parent()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if not use_cuda:
        torch_device = torch.device("cpu")
    else:
        torch_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torch_device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"at least {torch_device.index + 1} processes were started on this machine, but torch sees {torch.cuda.device_count()} "
                "GPUs. Start one process per GPU, or run on CPU with IWSFT_DEVICE=cpu."
            )
        torch.cuda.set_device(torch_device)
    import_megatron_core()
    raise_descriptor_limit()
    if not dist.is_initialized():
        bind = use_cuda and binds_device(bind_device, os.environ)
        options: dict[str, Any] = {"device_id": torch_device} if bind else {}
        if "MASTER_PORT" not in os.environ:  # a job of one needs no rendezvous
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s), **options
        )
    return Platform(device=torch_device, rank=dist.get_rank(), world_size=dist.get_world_size())


def binds_device(wanted: bool | None, environment: Mapping[str, str]) -> bool:
    """Whether to bind this process's GPU to NCCL at the start: as requested, and by default if torchrun's `environment` has one node."""
    if wanted is not None:
        return wanted
    return environment.get("LOCAL_WORLD_SIZE", "1") == environment.get("WORLD_SIZE", "1")


def stop() -> None:
    """Leave the job: destroy the process groups."""
    if dist.is_initialized():
        if "megatron.core.parallel_state" in sys.modules:
            destroy_model_parallel()
        dist.destroy_process_group()
