"""The Triton kernels compiled for GPUs that need not be here: instructions, loads, spills, variants; and no C compiler."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from megatron_iwsft.ops import logits as rows
from tests.support import run_python

pytestmark = [
    pytest.mark.parallel,  # only the newer line's torch comes with Triton
    pytest.mark.skipif(not rows.has_triton(), reason="Triton is not installed"),
]


@pytest.mark.command
@pytest.mark.parametrize(
    ("kernel", "vocabularies"),
    [
        ("statistics", ["32000", "32001", "50257", "128256", "151936", "256000"]),
        ("statistics with entropy", ["32001", "151936"]),
        ("gradient", ["32001", "151936"]),
    ],
)
def test_kernels_take_ten_instructions_per_logit_and_do_not_spill(
    kernel: str, vocabularies: list[str], tmp_path
) -> None:
    done = run_python(
        "tools/bench/kernels.py", "--json", "--kernel", kernel, "--vocabulary", *vocabularies, TRITON_CACHE_DIR=str(tmp_path)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(vocabularies) * 2 * 2  # sm_90 and sm_100, bf16 and fp32
    for line in found:
        assert line["spills"] == 0, line
        assert line["load_bits"] == 128, line
        assert 4 < line["instructions"] <= 10, line


def compiled_variants() -> list[int]:
    """How often each kernel is compiled for batches of different sizes and chunks that begin anywhere. Run by the test below."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from megatron_iwsft.ops import logits_triton as kernels

    driver.set_active(  # what Triton asks a driver before it compiles
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    for tokens, begin in [(64, 0), (33, 1), (48, 16), (7, 3), (1, 0)]:
        logits = torch.zeros(tokens, 304)[:, :300]
        length = tokens + begin
        target, lse, stats = torch.zeros(length, dtype=torch.int64), torch.zeros(length), torch.zeros(3, length)
        sizes = dict(COLUMNS=300, BLOCK=1024, grid=(tokens,))
        statistics = (logits, target[begin:], stats[:, begin:], logits.stride(0), stats.stride(0))
        kernels.statistics_kernel.warmup(*statistics, ENTROPY=False, **sizes)
        kernels.gradient_kernel.warmup(logits, target[begin:], lse[begin:], lse[begin:], logits.stride(0), **sizes)
    return [len(k.device_caches[0][0]) for k in (kernels.statistics_kernel, kernels.gradient_kernel)]


@pytest.mark.command
def test_batches_of_other_shapes_need_no_compilation(tmp_path) -> None:
    call = "from tests.ops.test_compiled_kernels import compiled_variants; print(compiled_variants())"
    done = run_python("-c", call, TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "[1, 1]", done.stdout + done.stderr


class OnGpu(torch.Tensor):
    """A tensor in host memory that says it is on a GPU."""

    is_cuda = True


def without_a_compiler() -> None:
    """Statistics and gradient of logits "on a GPU", where Triton finds a driver but no C compiler. Run by the test below."""
    from triton.backends.nvidia.driver import CudaDriver

    os.environ.pop("CC", None)
    CudaDriver.is_active = staticmethod(lambda: True)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    target, grad = torch.arange(5), torch.ones(5)
    found, expected = torch.zeros(3, 5), torch.zeros(3, 5)
    on_gpu = logits.clone().as_subclass(OnGpu)
    for _ in range(2):
        rows.row_statistics(on_gpu, target, out=found)
    rows.row_statistics(logits, target, out=expected)
    assert torch.equal(found, expected)
    lse = expected[0] + expected[1].log()
    rows.logits_gradient(on_gpu, target, lse, grad)
    rows.logits_gradient(logits, target, lse, grad)
    assert torch.equal(on_gpu.as_subclass(torch.Tensor), logits)
    print(rows.triton_refusal(logits.device))


@pytest.mark.command
def test_without_a_c_compiler_the_operator_uses_torch_and_says_so_once(tmp_path) -> None:
    call = "from tests.ops.test_compiled_kernels import without_a_compiler; without_a_compiler()"
    done = run_python(
        "-c", call, PATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path), TRITON_LIBCUDA_PATH=str(tmp_path)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton cannot launch a kernel: Failed to find C compiler")
    assert done.stderr.count("uses torch in place of its Triton kernels") == 1, done.stderr


def test_rows_of_the_logits_buffer_are_aligned() -> None:
    for columns in (32001, 50257, 128, 1):
        buffer = rows.logits_buffer(torch.zeros(1, dtype=torch.bfloat16), 3, columns)
        assert buffer.shape == (3, columns) and buffer.stride(0) % rows.ROW_ALIGNMENT == 0
        assert 0 <= buffer.stride(0) - columns < rows.ROW_ALIGNMENT
