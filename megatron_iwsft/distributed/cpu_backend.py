"""Megatron-Core without CUDA: the few places where it insists on a GPU are answered by their CPU counterparts.

Megatron-Core asks `torch.cuda` for the current device, streams, events, memory and random state, creates tensors with
`device="cuda"`, and its optimizer sorts parameters by the name of their CUDA tensor type. `install` answers all three.
It changes process-wide state, so only `context.start` calls it, once, in a process that runs a job on CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_iwsft.distributed.gloo import share_device
from megatron_iwsft.distributed.mcore_compat import skip_collectives_of_one, use_torch_in_place_of_fused_kernels
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.utils.memory import keep_freed_memory

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


_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace logspace ones ones_like rand rand_like "
    "randint randint_like randn randn_like randperm tensor zeros zeros_like"
).split()
_METHODS = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()
_TYPE_NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float64: "Double"}


def _on_cpu(create: Callable[..., Any]) -> Callable[..., Any]:
    """A function that creates tensors, on CPU where it is asked for CUDA."""

    @functools.wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return create(*args, **kwargs)

    return wrapped


def _stay_on_cpu() -> None:
    """Tensors that are created on or moved to CUDA are on CPU, and floating-point ones have the type names that the optimizer
    asserts on. A TorchFunctionMode would do the same in fewer lines, but it sees every operation: a small model's step would take half
    as much time again.
    """
    _device_constructors()  # caches what `with torch.device(…)` applies to: torch's own functions, not these
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in _METHODS:
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    to, type_ = _on_cpu(tensor.to), tensor.type
    tensor.to = lambda self, *args, **kwargs: to(self, *(_CPU if _is_cuda(a) else a for a in args), **kwargs)
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = lambda self, *args, **kwargs: (
        type_(self, *args, **kwargs)
        if args or kwargs or self.dtype not in _TYPE_NAMES
        else f"torch.cuda.{_TYPE_NAMES[self.dtype]}Tensor"
    )


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *unused: Any
) -> tuple[torch.Tensor, None]:
    """The gradient norm, in float64: torch's float32 norm on CPU is off by 3e-4 for a few million elements, and by another
    amount at every layout. Stands in for Megatron-Core's local fallback of a fused kernel.

    torch makes a float64 copy, so in parts that fit a core's cache.
    """
    parts = (part for tensors in tensor_lists for t in tensors for part in t.reshape(-1).split(1 << 16))
    squares = [torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts]
    return torch.stack(squares).sum().sqrt().float().reshape(1), None


def _with_sizes_as_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """The expert dispatcher copies split sizes from the GPU into lists, but leaves CPU tensors as they are."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sizes = {k: v.tolist() for k, v in kwargs.items() if k.endswith("split_sizes") and torch.is_tensor(v)}
        return all_to_all_single(*args, **kwargs | sizes)

    return wrapped


def _as_written(function: Any = None, **options: Any) -> Any:
    """In place of `torch.compile`, which is a decorator too."""
    return function if function is not None else lambda f: f


def _compile_nothing() -> None:
    """Run Megatron-Core's fused functions as they are written. Compiling them takes a C++ compiler and seconds per shape, and importing
    torch's compiler takes seconds of each process's start, so the optimizer does not ask it either whether it is being compiled.
    """
    torch.compile = _as_written  # type: ignore[assignment]
    if "torch._dynamo" in sys.modules:  # Megatron-Core may have been imported, too
        torch._dynamo.config.disable = True
    optimizer: Any = torch.optim.Optimizer
    for method in vars(optimizer).values():
        if hasattr(method, "__wrapped__"):
            setattr(method.__wrapped__, "__dynamo_disable", method.__wrapped__)
    adam: Any = torch.optim.Adam
    adam.step = torch.no_grad()(adam.step.__wrapped__)


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

    keep_freed_memory()
    _compile_nothing()
    share_device()
    use_torch_in_place_of_fused_kernels(_l2_norm, get_rng_state, set_rng_state)
    skip_collectives_of_one()

    torch.distributed.all_to_all_single = _with_sizes_as_lists(torch.distributed.all_to_all_single)

    _stay_on_cpu()
