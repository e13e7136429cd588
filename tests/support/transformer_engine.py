"""Transformer Engine's layers on a CPU: for tests of everything about them but their kernels.

Queries about the device are answered as on a Hopper GPU. The kernels that layers call in bf16 and, with one scale per tensor, in FP8 are
computed by torch. Attention is the local backend's.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.hf.architecture import Architecture
from tests.support import tiny

FAMILIES = {
    "dense": tiny.model_config("qwen2", num_hidden_layers=2),
    "experts": tiny.model_config(
        "qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
}


def te(test: Any) -> Any:
    """Marks a test that needs Transformer Engine, but no GPU. One that is installed but broken makes it fail."""
    missing = importlib.util.find_spec("transformer_engine") is None
    return pytest.mark.te(pytest.mark.skipif(missing, reason="Transformer Engine is missing")(test))


def architecture(family: str) -> Architecture:
    return Architecture.from_hf(FAMILIES[family], where="test")


@contextmanager
def as_on_hopper(attention: type | None = None) -> Iterator[None]:
    """Within it, Transformer Engine's layers can be built and, in bf16 and dense in FP8, run. attention: instead of the local backend's."""
    import transformer_engine_torch as kernels
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.common.embeddings import rope_utils
    from transformer_engine.pytorch import cpp_extensions, utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import grouped_linear, layernorm_linear, linear
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.ops.basic import rmsnorm
    from transformer_engine.pytorch.tensor import utils as parameters

    from megatron_iwsft.model.packed_attention import PackedAttention

    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H200", total_memory=141 << 30)
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_properties", lambda *args, **kwargs: gpu),
        (torch.cuda, "get_device_capability", lambda *args: (9, 0)),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (TransformerEngineBaseModule, "prepare_forward", _on_cuda(TransformerEngineBaseModule.prepare_forward)),
        (TESpecProvider, "core_attention", lambda self: attention or PackedAttention),
        (rope_utils, "fused_apply_rotary_pos_emb_thd", _rotate),
        *((module, "_empty_tensor", torch.Tensor) for module in (utils, gemm)),
        *((module, "get_dummy_wgrad", _not_a_gradient) for module in (linear, layernorm_linear, grouped_linear)),
        (kernels, "generic_gemm", _matmul),
        (kernels, "te_general_grouped_gemm", _grouped_matmul),
        *((module, "rmsnorm_fwd", _rms_norm) for module in (kernels, cpp_extensions, rmsnorm)),
        *((module, "rmsnorm_bwd", _rms_norm_backward) for module in (kernels, cpp_extensions, rmsnorm)),
        (kernels, "quantize", _quantize),
        (kernels, "bgrad_quantize", lambda grad, quantizer: (grad.flatten(0, -2).sum(0), _quantize(grad, quantizer))),
        (kernels, "fp8_transpose", _transpose),
        (kernels, "compute_amax", lambda x, largest: largest.copy_(x.abs().max())),
        (parameters, "multi_tensor_scale", _scale_all),
        (param_and_grad_buffer, "_coalescing_manager", _one_by_one),
        (parameters, "multi_tensor_compute_scale_and_scale_inv", _scales_of_all),
    ]
    # Delayed scaling has its scales computed in torch by Transformer Engine itself.
    patches: list[Any] = [mock.patch.dict(os.environ, NVTE_UNFUSED_FP8_UPDATE="1")]
    patches += [mock.patch.object(*answer) for answer in answers]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def _one_by_one(group: Any, async_ops: bool = False) -> Iterator[None]:
    """In place of collectives that are sent together, which gloo mixes up where they have several dtypes, and NCCL does not."""
    assert not async_ops
    yield


class _OnCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func == torch.Tensor.is_cuda.__get__ else func(*args, **kwargs or {})


def _on_cuda(method: Any) -> Any:
    """A method to which every tensor is on a GPU."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _OnCuda():
            return method(*args, **kwargs)

    return wrapped


def _not_a_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What autograd gets where the gradient was added to `main_grad` already: memory with any content."""
    return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype)


def _matmul(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """cuBLAS counts columns first: its op(a) · op(b) is op(b) · op(a) of torch's matrices."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    bias, grad, accumulate = others[0], others[4], others[7]
    values = (x.dequantize(dtype=torch.float32) if hasattr(x, "_scale_inv") else x for x in (a, b))
    right, left = (x.flatten(0, -2).float() for x in values)
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    bias_gradient = left.sum(0).to(b.dtype) if bias is not None and grad else None
    if bias is not None and not grad:
        product += bias.float()
    if out is None:
        out = product.to(a.dtype if dtype is None else TE_DType_To_Torch[dtype])
    else:
        out.copy_(out + product if accumulate else product)
    return out, bias_gradient, None, None


def _grouped_matmul(
    a: list[Tensor], transpose_a: bool, b: list[Tensor], transpose_b: bool, out: list[Tensor], *others: Any
) -> Any:
    splits, bias, single, accumulate = others[1], others[2], others[4], others[9]
    if single:
        out = list(out[0].split(splits))
    for x, y, z in zip(a, b, out, strict=True):
        if y.shape[0]:
            _matmul(x, transpose_a, y, transpose_b, z, None, None, *[None] * 4, False, None, None, accumulate)
        elif not accumulate and not single:
            z.zero_()
    return bias


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: None = None, quantizer: Any = None, *others: Any
) -> tuple[Any, None, Tensor]:
    flat = x.flatten(0, -2).float()
    scale = (flat.square().mean(-1) + eps).rsqrt()
    normed = (flat * scale[:, None] * weight.float()).to(x.dtype).view(x.shape)
    return normed if quantizer is None else _quantize(normed, quantizer), None, scale


def _rms_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    g, normal = grad.flatten(0, -2).float(), x.flatten(0, -2).float() * scale.view(-1, 1)
    weighted = g * weight.float()
    back = (weighted - normal * (weighted * normal).mean(-1, keepdim=True)) * scale.view(-1, 1)
    return back.to(x.dtype).view(x.shape), (g * normal).sum(0).to(weight.dtype)


class _Rotation(torch.autograd.Function):
    """Rotates by angles and, backward, by their negatives, so that it keeps no tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, *options: Any) -> Tensor:
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

        ctx.angles, ctx.options = angles, options
        boundaries, interleaved, group = options
        return _apply_rotary_pos_emb_thd(x, boundaries, angles, rotary_interleaved=interleaved, cp_group=group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotation.forward(ctx, grad, -ctx.angles, *ctx.options), None, None, None, None


def _rotate(x: Tensor, boundaries: Tensor, angles: Tensor, *, cp_size: int, cp_rank: int, interleaved: bool) -> Tensor:
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    return _Rotation.apply(x, angles, boundaries, interleaved, group)


def _quantize(x: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """One scale per tensor: its own, or that of a delayed recipe, whose new maximum is recorded."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    kind = TE_DType_To_Torch[quantizer.dtype]
    limit, largest = torch.finfo(kind).max, x.float().abs().max()
    delayed = hasattr(quantizer, "amax")
    if delayed and quantizer.amax.numel():
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
    scale = quantizer.scale.view(()) if delayed else _scale(limit, largest)
    stored = (x.float() * scale).clamp(-limit, limit).to(kind).view(torch.uint8)
    if out is None:
        out = quantizer.create_tensor_from_data(stored.clone(), x.dtype, internal=quantizer.internal)
        if quantizer.columnwise_usage:
            out._transpose, out._transpose_invalid = _transpose(stored), False
    if out._data is not None:
        out._data.copy_(stored.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(_transpose(stored))
    out._scale_inv.copy_((1 / scale).view_as(out._scale_inv))
    return out


def _scale(limit: float, largest: Tensor) -> Tensor:
    return limit / largest.clamp(min=1e-12)


def _transpose(stored: Tensor, *kind: Any, out: Tensor | None = None) -> Tensor:
    transposed = stored.flatten(0, -2).t().contiguous()
    return transposed if out is None else out.copy_(transposed)


def _scale_all(chunk: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def _scales_of_all(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], limit: float, power_of_two: bool, epsilon: float
) -> None:
    for largest, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(limit, largest))
        inverse.copy_(1 / scale)


def packed_row(lengths: list[int], *, seed: int = 0) -> Batch:
    """A row of random tokens, trained on everywhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, 300, (1, sum(lengths)), generator=generator) for _ in range(2))
    sizes, count = torch.tensor(lengths), len(lengths)
    return Batch(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        segment=torch.repeat_interleave(torch.arange(count), sizes),
        reference=None,
        cu_seqlens=torch.tensor([0, *sizes.cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        lengths=sizes.float(),
        quality=torch.ones(count),
        trajectory=torch.arange(count),
    )
