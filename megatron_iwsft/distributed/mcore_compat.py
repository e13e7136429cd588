"""The only module that uses Megatron-Core's private names or handles differences between its versions (0.16, 0.18, 0.19).

tests/distributed/test_mcore_compat.py has a canary for every name, which fails on the line where the name or its contract moved.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import io
import logging
import os
import pickle
import queue
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iwsft.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch.distributed.checkpoint.metadata import Metadata

T = TypeVar("T")


def quiet_megatron() -> None:
    """Silence warnings about optional packages, in this process and its children. Call before Megatron-Core is first imported."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\..*")
    # Transformer Engine's are about settings that cost speed.
    warnings.filterwarnings("default", category=UserWarning, module=r"transformer_engine\..*")
    # The optimizer asks slices of a parameter for their .grad before it has set one.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for name in ("megatron", "torch.distributed.checkpoint", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def import_megatron_core() -> None:
    """Import Megatron-Core, where a GPU is used after it was chosen: Transformer Engine asks for its capabilities.

    Without wandb, which its inference alone uses, and which every process would wait for at its start.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment] # an ImportError, which Megatron-Core expects
    try:
        from megatron.core.transformer.moe import moe_utils
    finally:
        if hidden:
            del sys.modules["wandb"]
    # 0.16 without Transformer Engine asks in the router whether its matrix product is None, but never defined the name.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def checked(settings: type[T], *, more: Mapping[str, Any], **ours: Any) -> T:
    """A settings object of Megatron-Core: `ours`, and from `more` those that this class knows.

    Raises ConfigError if Megatron-Core refuses the combination.
    """
    known = {field.name for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    try:
        return settings(**ours | {name: value for name, value in more.items() if name in known})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"Megatron-Core {_version()} does not support these settings: {error}. "
            "Change these settings, or install another version of Megatron-Core."
        ) from None


def check_settings(names: Iterable[str]) -> None:
    """Raise ConfigError if one of `names`, of the section `megatron`, is no setting of the installed Megatron-Core."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {f.name for cls in (DistributedDataParallelConfig, TransformerConfig) for f in dataclasses.fields(cls)}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"megatron.{name} is no setting of the installed Megatron-Core {_version()}. Leave it out, or install another version."
            )


def _version() -> str:
    return importlib.metadata.version("megatron-core")


def mlp_submodules(layer: ModuleSpec) -> Any:
    """The submodules of a layer spec's dense or expert feed-forward part: 0.16 nests specs there, 0.19 a partially called constructor."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules


# Saving


def async_save_options() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` for a request that Megatron-Core's own writer carries out.

    0.19 has a second writer, of another package, and takes it by default; 0.16 has one and no argument.
    """
    from megatron.core.dist_checkpointing import save

    known = inspect.signature(save).parameters
    return {"async_sharded_save": True} | ({"async_strategy": "mcore"} if "async_strategy" in known else {})


def save_strategy() -> Any:
    """Megatron-Core's writer of tensors, for `dist_checkpointing.save`, which plans the first two saves and repeats that plan later.

    So it must be used for states of one structure only. All ranks' plans, which it would append to `.metadata` and nobody reads, are
    left out.
    """
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    class Strategy(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *args: Any) -> Any:
            metadata = planned[1]  # on the first rank
            if metadata is not None:
                vars(metadata).pop("all_local_plans", None)
            return super()._get_save_and_finalize_callbacks(writer, planned, *args)

    return Strategy("torch_dist", 1, cached_metadata=True)


def async_calls_queue() -> AsyncCallsQueue:
    """Where Megatron-Core keeps save requests that are being carried out."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    return AsyncCallsQueue()


class WriteResults:
    """What checkpoint writers tell the process that forked them: a queue in anonymous memory.

    Megatron-Core's own queue is a process with a socket, which can be killed, ends the run when it cannot start, and outlives a
    killed trainer.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("write-results")
        self._read = 0

    def put(self, result: object) -> None:
        """Append a result. One process at a time writes: a save starts when the one before is complete."""
        content = memoryview(pickle.dumps(result))
        os.lseek(self._file, 0, os.SEEK_END)
        while content:
            content = content[os.write(self._file, content) :]

    def get_nowait(self) -> Any:
        """The oldest result that was not taken yet. Raises queue.Empty if there is none, or not a whole one."""
        content = os.pread(self._file, os.fstat(self._file).st_size - self._read, self._read)
        stream = io.BytesIO(content)
        try:
            result = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._read += stream.tell()
        return result

    def clear(self) -> None:
        """Before a save: drop what an earlier one that failed has left."""
        os.ftruncate(self._file, 0)
        self._read = 0


def write_results() -> WriteResults:
    """This process's queue of write results, put in the place of Megatron-Core's."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(filesystem_async._results_queue, WriteResults):
        filesystem_async._results_queue = WriteResults()
    return filesystem_async._results_queue


def write_in_this_process() -> None:
    """Have Megatron-Core's writer write its files itself, one after the other, in a process that does nothing else.

    0.16 forks processes for them and 0.19 starts threads. Where memory runs out, a process is killed and a thread dies as it starts;
    both are waited for without end.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    in_turn = SimpleNamespace(Process=_Call, Thread=_Call, Queue=queue.Queue, JoinableQueue=queue.Queue)
    vars(filesystem_async).update(mp=SimpleNamespace(get_context=lambda method: in_turn), threading=in_turn)


class _Call:
    """In place of a process or thread: a call, complete once it has been started."""

    def __init__(self, target: Callable[..., None], kwargs: dict[str, Any]) -> None:
        self.start = partial(target, **kwargs)

    def join(self) -> None:
        pass


@contextmanager
def scaling_histories_may_be_unpickled() -> Iterator[None]:
    """Within it, Transformer Engine (2.20 or newer) loads its state of delayed scaling, a pickle: for pickles that were checked."""
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def reading_with(metadata: Metadata) -> Iterator[None]:
    """Within the block, Megatron-Core loads a checkpoint by `metadata` in place of its `.metadata`, which every rank would read."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata

    original = strategies._get_filesystem_reader
    modules = [strategies, *([serialization] if hasattr(serialization, "_get_filesystem_reader") else [])]
    for module in modules:
        module._get_filesystem_reader = lambda directory, *args, **kwargs: Reader(directory)
    try:
        yield
    finally:
        for module in modules:
            module._get_filesystem_reader = original


# Process groups


def destroy_model_parallel() -> None:
    """Destroy the process groups of Megatron-Core's parallel state. Its own function forgets them, but each keeps threads and connections.

    Collective over all ranks.
    """
    from megatron.core import parallel_state

    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in dict.fromkeys(groups):
        if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


# The optimizer


@dataclass(frozen=True)
class OptimizerShard:
    """What this rank's optimizer holds of one model parameter.

    start, end  its elements start … end − 1, of the flattened parameter
    main        float32 [end − start] (flat) or of the parameter's shape: what the optimizer updates
    inner       torch's or Transformer Engine's optimizer, which keeps the states of `main`
    replicated  over data-parallel ranks
    """

    parameter: torch.nn.Parameter
    start: int
    end: int
    main: Tensor
    inner: torch.optim.Optimizer
    replicated: bool


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """torch's or Transformer Engine's optimizers of dense parameters and of experts, skipping those without parameters on this rank."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


def optimizer_shards(optimizer: MegatronOptimizer) -> Iterator[OptimizerShard]:
    """Every shard of Megatron-Core's chained optimizer on this rank, in a fixed order. Not collective."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                held = part._get_model_param_range_map(parameter)["param"]
                group, place = part.model_param_group_index_map[parameter]
                main = inner.param_groups[group]["params"][place]
                yield OptimizerShard(parameter, held.start, held.end, main, inner, replicated=False)
        else:
            groups = zip(
                getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True
            )
            parameter_of = {id(main): p for ps, mains in groups for p, main in zip(ps, mains, strict=True)}
            for main in (main for group in inner.param_groups for main in group["params"]):
                parameter = parameter_of.get(id(main), main)  # a float32 parameter is its own main parameter
                yield OptimizerShard(parameter, 0, main.numel(), main, inner, replicated=True)


def prepare_gradients(optimizer: MegatronOptimizer) -> float | Tensor:
    """Make the reduced gradients ready for an update; returns their global norm before clipping. Collective over all ranks.

    Megatron-Core's optimizers skip an update by themselves only where a gradient scaler (fp16) looks for infinities.
    """
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def update_parameters(optimizer: MegatronOptimizer, norm: float | Tensor) -> None:
    """Clip by the norm that `prepare_gradients` returned and update: `optimizer.step()`, which would compute the norm again."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Have every rank hold the updated parameters now; with overlapped gathering they arrive no sooner than the next forward pass."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def set_parameters_from_main(optimizer: MegatronOptimizer) -> None:
    """Round the optimizer's float32 parameters to the model's, as an update does. Collective over all ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    chunks: dict[int, DistributedDataParallel] = {}
    for part in optimizer.chained_optimizers:
        if hasattr(part, "_copy_main_params_to_model_params"):  # not where parameters are their own main parameters
            part._copy_main_params_to_model_params()
        if isinstance(part, DistributedOptimizer):
            chunks |= {id(chunk): chunk for chunk in part.model_chunks}
    gather_parameters(list(chunks.values()))


def unquantized_copy(parameter: Tensor) -> Tensor | None:
    """Of an FP8 parameter, its value in bf16 on the host: what it was quantised from, and what the optimizer starts its float32 copy
    from. None for other parameters, and once it was freed.
    """
    return parameter.get_high_precision_init_val() if hasattr(parameter, "get_high_precision_init_val") else None


def free_unquantized_copies(module: torch.nn.Module) -> None:
    """The distributed optimizer frees only those of which it holds a shard."""
    for parameter in module.parameters():
        if unquantized_copy(parameter) is not None:
            parameter.clear_high_precision_init_val()  # type: ignore[attr-defined]


# Random states


def random_states() -> dict[str, Any]:
    """This rank's states of torch's and Megatron-Core's random generators."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Continue from what `random_states` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["megatron"])


# Without CUDA: see cpu_backend.py


def use_torch_in_place_of_fused_kernels(
    l2_norm: Callable[..., Any], get_rng_state: Callable[..., Tensor], set_rng_state: Callable[..., None]
) -> None:
    """Have Megatron-Core take torch's optimizer and kernels: where Transformer Engine or apex can be imported, it takes theirs,
    which need CUDA. Process-wide.
    """
    import_megatron_core()
    from megatron.core import optimizer as optimizers
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier, module.multi_tensor_scale_impl = (
            local_multi_tensor_applier,
            local_multi_tensor_scale,
        )
    clip_grads.multi_tensor_scale_tensor_impl = None
    clip_grads.l2_norm_impl = l2_norm
    moe_utils.te_general_gemm = None
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state


def skip_collectives_of_one() -> None:
    """Have gradients and parameters stay where they are if one process has all of them: gloo would copy the whole buffer several times,
    on one thread. Not for asynchronous calls. Process-wide.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    coalesce = buffers._coalescing_manager

    def coalescing_manager(group: dist.ProcessGroup, *, async_ops: bool = False) -> Any:
        return coalesce(group, async_ops=async_ops) if async_ops or group.size() > 1 else nullcontext()

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(output: Tensor, given: Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
            if options.get("async_op") or group.size() > 1:
                return collective(output, given, group=group, **options)
            assert output.data_ptr() == given.data_ptr(), "Megatron-Core reduces and gathers in place"

        return wrapped

    buffers._coalescing_manager = coalescing_manager
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
