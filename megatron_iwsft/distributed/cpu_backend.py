"""Megatron-Core without CUDA: the few places where it insists on a GPU are answered by their CPU counterparts.

Megatron-Core asks `torch.cuda` for the current device, streams, events, memory and random state, creates tensors with
`device="cuda"`, and its optimizer sorts parameters by the name of their CUDA tensor type. `install` answers all three.
It changes process-wide state, so only `context.start` calls it, once, in a process that runs a job on CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from megatron_iwsft.distributed.gloo import share_device
from megatron_iwsft.distributed.mcore_compat import use_torch_in_place_of_fused_kernels
from megatron_iwsft.errors import ConfigError

_CPU = torch.device("cpu")


class _Event:
    """Everything on CPU has happened by the time it can be asked about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _CudaToCpu(TorchFunctionMode):
    """Places on CPU what asks for a CUDA device, and names tensor types the way the optimizer asserts on them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(a) else a for a in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *unused: Any
) -> tuple[torch.Tensor, None]:
    """The gradient norm, in float64: torch's float32 norm on CPU is off by 3e-4 for a few million elements, and by another
    amount at every layout. Stands in for Megatron-Core's local fallback of a fused kernel.
    """
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for tensors in tensor_lists for t in tensors]
    return torch.stack(squares).sum().sqrt().float().reshape(1), None


def _with_sizes_as_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """The expert dispatcher copies split sizes from the GPU into lists, but leaves CPU tensors as they are."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sizes = {k: v.tolist() for k, v in kwargs.items() if k.endswith("split_sizes") and torch.is_tensor(v)}
        return all_to_all_single(*args, **kwargs | sizes)

    return wrapped


def install() -> None:
    """Make Megatron-Core run on CPU in this process, permanently. Call before any Megatron-Core module is built. Idempotent.

    Raises ConfigError in a process that uses CUDA already.
    """
    cuda: Any = torch.cuda
    if cuda.Stream is _Stream:
        return
    if cuda.is_initialized():
        raise ConfigError(
            "this process uses CUDA already, and cannot become one of a job on CPU. Start that job in a process of its own."
        )
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.get_device_properties = lambda *args: SimpleNamespace(major=0, minor=0)
    cuda._lazy_init = lambda: None

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.random.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.random.set_rng_state(state)

    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = set_rng_state
    cuda.manual_seed = torch.random.default_generator.manual_seed

    share_device()
    use_torch_in_place_of_fused_kernels(_l2_norm, get_rng_state, set_rng_state)

    # Megatron-Core's fused functions run as they are written: compiling them takes a C++ compiler and seconds per shape.
    torch._dynamo.config.disable = True

    torch.distributed.all_to_all_single = _with_sizes_as_lists(torch.distributed.all_to_all_single)

    # Entered for the life of the process: Megatron-Core builds tensors in every phase of a run.
    _CudaToCpu().__enter__()
