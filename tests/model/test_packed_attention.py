"""The local backend's attention: one variable-length call against one call per segment."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_iwsft.distributed.capabilities import variable_length_attention
from megatron_iwsft.model.moe import PackedRow
from megatron_iwsft.model.packed_attention import _attend, _attend_at_once

BOUNDARIES = [0, 5, 12, 19, 20, 50, 64]


def varlen_attn_on_cpu(query, key, value, at_q, at_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """A replacement for torch's varlen_attn, written from its documentation: the real one needs a GPU and half precision."""
    assert query.shape == key.shape == value.shape
    assert (max_q, max_k) == (30, 30) and torch.equal(at_q, at_k) and at_q.dtype == torch.int32
    left, right = window_size
    outs = []
    for start, stop in zip(at_q.tolist(), at_q.tolist()[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        ahead = torch.arange(stop - start)[None, :] - torch.arange(stop - start)[:, None]
        visible = (ahead <= right if right >= 0 else ahead == ahead) & (-ahead <= left if left >= 0 else ahead == ahead)
        outs.append(scaled_dot_product_attention(q, k, v, visible, scale=scale).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.numerics
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_variable_length_call_equals_one_call_per_segment(
    device: str, window: int | None, groups: int, monkeypatch
) -> None:
    if device == "cuda" and not variable_length_attention()[0]:
        pytest.skip(variable_length_attention()[1])
    pytest.importorskip("torch.nn.attention.varlen")
    if device == "cpu":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_on_cpu)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(64, heads, 32, generator=generator).to(device, dtype) for heads in (4, groups, groups))
    grad = torch.randn(64, 4, 32, generator=generator).to(device, dtype)
    boundaries = torch.tensor(BOUNDARIES, dtype=torch.int32, device=device)
    row = PackedRow(qkv_format="thd", cu_seqlens_q=boundaries, max_seqlen_q=30)

    def run(function, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        out.backward(grad.to(dtype))
        return [out.detach().double(), *(x.grad.double() for x in inputs)]

    at_once = run(lambda *x: _attend_at_once(*x, row, 0.2, window), dtype)
    exact = run(lambda *x: _attend(*x, row.boundaries, 0.2, window), torch.float64)
    for found, expected in zip(at_once, exact, strict=True):
        # Gradients of queries and keys that see one key are zero: rounding errors are those of the gradient that comes in.
        scale = expected.norm() if expected.norm() > 1e-9 else grad.double().norm()
        assert (found - expected).norm() / scale < (1e-2 if dtype == torch.bfloat16 else 1e-6)
