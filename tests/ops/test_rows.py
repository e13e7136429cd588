"""Triton's kernels, under its interpreter, against the torch path."""

from __future__ import annotations

import pytest
import torch

from megatron_iwsft.ops import rows

pytestmark = [
    pytest.mark.parallel,  # Megatron-Core's newer line comes with a torch that brings Triton
    pytest.mark.skipif(not rows.has_triton(), reason="Triton is not installed"),
]


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from megatron_iwsft.ops import rows_triton

    return rows_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 300, 4096, 9001])
def test_kernels_do_what_torch_does(kernels, dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    n = 7
    storage = (torch.randn(n, columns + 5, generator=generator) * 8).to(dtype)
    logits = storage[:, :columns]
    target = torch.randint(-columns, 2 * columns, (n,), generator=generator)
    target[0] = 0
    found, expected = torch.full((4, n), torch.nan), torch.full((4, n), torch.nan)
    kernels.row_statistics(logits, target, found)
    rows.row_statistics(logits, target, out=expected)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(found[[1, 3]], expected[[1, 3]], rtol=1e-5, atol=1e-6)
    three = torch.empty(3, n)
    kernels.row_statistics(logits, target, three)
    assert torch.equal(three, found[:3])

    lse, grad = expected[0] + expected[1].log(), torch.randn(n, generator=generator)
    copy, beyond = logits.clone(), storage[:, columns:].clone()
    kernels.logits_gradient(logits, target, lse, grad)
    rows.logits_gradient(copy, target, lse, grad)
    torch.testing.assert_close(logits, copy, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert torch.equal(storage[:, columns:], beyond), "wrote beyond the row"


def test_no_rows_and_no_columns(kernels) -> None:
    none = torch.empty(3, 0)
    kernels.row_statistics(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), none)
    out = torch.full((4, 2), torch.nan)
    rows.row_statistics(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), out=out)
    assert (out[0] == torch.finfo(torch.float32).min).all() and not out[1:].any()
