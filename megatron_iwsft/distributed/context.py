"""Where the run happens: CUDA + NCCL or CPU + gloo, the process groups, and what differs between Megatron-Core lines.

Nothing else in the package asks Megatron-Core's `parallel_state`, `torch.cuda` or the environment. `start` once per
process gives a `Platform`; `Platform.parallel` gives a `ParallelContext` with explicit groups for everything below.
"""

from __future__ import annotations

import datetime
import inspect
import logging
import multiprocessing
import os
import signal
import warnings
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_iwsft.distributed.capabilities import transformer_engine
from megatron_iwsft.distributed.stop_signals import (
    STOP_SIGNALS,
    die_with_parent,
    die_with_spawner,
    forks_die_with_their_parent,
)
from megatron_iwsft.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ParallelContext:
    """The process groups of one layout, and this rank's place in each.

    dp is data parallel alone; dp_cp spans data and context parallel ranks, over which losses and gradients are summed. ep, the
    expert-parallel group, lies across tensor, context and data parallel ranks.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    virtual_pipeline: int | None

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage in this rank's pipeline."""
        return dist.get_process_group_ranks(self.pp)[-1]

    def describe(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "DP": self.dp}
        text = " × ".join(f"{name} {group.size()}" for name, group in sizes.items())
        text += f", EP {self.ep.size()}" if self.ep.size() > 1 else ""
        return text + (f", {self.virtual_pipeline} virtual stages" if self.virtual_pipeline else "")


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

    def parallel(
        self,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        expert: int = 1,
        virtual_pipeline: int | None = None,
        seed: int = 0,
    ) -> ParallelContext:
        """Build the process groups (collective over all ranks). Call again for another layout: the old groups go.

        `seed` starts torch's and Megatron-Core's tensor-parallel random states (only dropout would draw from them).
        """
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        product = tensor * pipeline * context
        if self.world_size % product:
            raise ConfigError(
                f"parallel: tensor {tensor} × pipeline {pipeline} × context {context} = {product} does not divide the "
                f"{self.world_size} processes that were started. Start a multiple of {product} processes, or change the degrees."
            )
        if self.world_size // pipeline % expert:
            raise ConfigError(
                f"parallel.expert {expert} does not divide the {self.world_size // pipeline} processes of a pipeline stage. Choose a "
                "divisor, or change the other degrees."
            )
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=1,  # experts are small: whole ones are spread, none is cut
            virtual_pipeline_model_parallel_size=virtual_pipeline,
        )
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        return ParallelContext(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            cp=parallel_state.get_context_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
            ep=parallel_state.get_expert_model_parallel_group(),
            virtual_pipeline=virtual_pipeline,
        )

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on any rank. Collective: a maximum over all ranks."""
        return bool(self.largest(condition)[0])

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks. Collective."""
        out = torch.tensor(values, dtype=torch.int, device=self.device)
        dist.all_reduce(out, op=dist.ReduceOp.MAX)
        return out.tolist()

    def peak_memory(self) -> int:
        """Peak bytes held by this process: the allocator's on CUDA, the resident set on CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def start(device: DeviceChoice = "auto", *, timeout_s: float = 600.0) -> Platform:
    """Join the job that torchrun describes in the environment (or be a job of one) and decide on the device.

    Collective over all ranks. `IWSFT_DEVICE=cpu|cuda` stands in for `device="auto"`.
    """
    choice = os.environ.get("IWSFT_DEVICE", "auto") if device == "auto" else device
    if choice not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"IWSFT_DEVICE is {choice!r}; it can be auto, cpu or cuda.")
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError("a CUDA device was asked for, but torch sees none. Run on CPU with IWSFT_DEVICE=cpu.")
    use_cuda = has_cuda and choice != "cpu"

    quiet_megatron()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun, when it is killed, leaves its workers, and they the writers they have forked
        forks_die_with_their_parent()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if not use_cuda:
        from megatron_iwsft.distributed import cpu_backend as cpu

        cpu.install()
        torch_device = torch.device("cpu")
    else:
        torch_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torch_device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"{torch_device.index + 1} processes or more were started here, but torch sees {torch.cuda.device_count()} GPUs. "
                "Start one process a GPU, or run on CPU with IWSFT_DEVICE=cpu."
            )
        torch.cuda.set_device(torch_device)
    _define_missing_names()
    if not dist.is_initialized():
        options: dict[str, Any] = {"device_id": torch_device} if use_cuda else {}
        if "MASTER_PORT" not in os.environ:  # a job of one needs no rendezvous
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if use_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s), **options
        )
    return Platform(device=torch_device, rank=dist.get_rank(), world_size=dist.get_world_size())


def _define_missing_names() -> None:
    """0.16 without Transformer Engine asks whether its matrix product is None in the router, but never said so."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def random_states() -> dict[str, Any]:
    """This rank's states of torch's and Megatron-Core's random generators."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Continue where `random_states` was taken."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["megatron"])


def stop() -> None:
    """Leave the job: destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def moe_submodules(layer: Any) -> Any:
    """The mixture of experts' submodules in a layer spec: 0.16 nests specs there, 0.19 a partially called constructor."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules


def async_save_options() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` for a request that Megatron-Core's own writer will carry out.

    0.19 has a second writer, of another package, and takes it by default; 0.16 has one and no
    argument.
    """
    from megatron.core.dist_checkpointing import save

    known = inspect.signature(save).parameters
    return {"async_sharded_save": True} | ({"async_strategy": "mcore"} if "async_strategy" in known else {})


def start_results_queue() -> None:
    """Start the process through which Megatron-Core's checkpoint writers report, as one that ends with this.

    Megatron-Core starts it at the first save, and it would outlive a killed trainer, holding its output open, or die of the stop
    signals that Slurm sends to all processes of a job, and the save with it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        resource_tracker.ensure_running()  # its start, which else happens within the manager's, unblocks SIGTERM
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which a new process inherits
        try:
            manager.start(initializer=die_with_spawner)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        filesystem_async._results_queue = manager.Queue()  # keeps the manager alive


def quiet_megatron() -> None:
    """Silence notices about optional packages, here and in child processes.

    Call before the first import of Megatron-Core: it warns while it is imported.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch|transformer_engine)\..*")
    # The optimizer asks slices of a parameter for their .grad before it has set one.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
