"""The Triton kernels, in Triton's interpreter, against the torch implementation."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_iwsft.ops import logits as rows

if rows.has_triton():
    from megatron_iwsft.ops import logits_triton as kernels

pytestmark = [
    pytest.mark.parallel,  # run on both Megatron-Core lines: only the newer one's torch comes with Triton
    pytest.mark.numerics,
    pytest.mark.skipif(not rows.has_triton(), reason="Triton is not installed"),
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")


@pytest.mark.command
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """Runs this file in a subprocess: Triton reads TRITON_INTERPRET when it is imported, and Megatron-Core may have imported it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed, 1 skipped", done.stdout), done.stdout


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 300, 4096, 9001])
def test_kernels_match_torch(dtype: torch.dtype, columns: int) -> None:
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
    assert torch.equal(storage[:, columns:], beyond), "the kernel wrote past the end of a row"


@interpreted
def test_no_rows_and_no_columns() -> None:
    none = torch.empty(3, 0)
    kernels.row_statistics(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), none)
    out = torch.full((4, 2), torch.nan)
    rows.row_statistics(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), out=out)
    assert (out[0] == torch.finfo(torch.float32).min).all() and not out[1:].any()
