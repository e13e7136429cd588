"""What is set before Megatron-Core and CUDA start, however a process was launched."""

from __future__ import annotations

import pytest

from megatron_iwsft.distributed.context import binds_device
from tests.support import run_python

pytestmark = pytest.mark.command

PREPARE = """
import os, torch
torch.cuda.is_available = lambda: True
from megatron_iwsft.distributed.context import prepare
prepare("cuda")
print(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], torch.cuda.is_initialized())
"""
WARN = """
import warnings
from megatron_iwsft.distributed.mcore_compat import quiet_megatron
quiet_megatron()
for module in ("megatron.core.x", "transformer_engine.pytorch.module.base"):
    warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module=module)
"""


def test_kernels_start_in_launch_order_whatever_launched_the_process() -> None:
    assert run_python("-c", PREPARE).stdout.split() == ["1", "False"]
    assert run_python("-c", PREPARE, CUDA_DEVICE_MAX_CONNECTIONS="8").stdout.split() == ["8", "False"]


@pytest.mark.parametrize(
    ("wanted", "world", "local", "binds"),
    [
        (None, "8", "8", True),
        (None, "16", "8", False),
        (None, None, None, True),
        (None, "2", None, False),
        (True, "16", "8", True),
        (False, "8", "8", False),
    ],
)
def test_a_gpu_is_bound_on_one_node_unless_wanted_otherwise(
    wanted: bool | None, world: str | None, local: str | None, binds: bool
) -> None:
    environment = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}
    assert binds_device(wanted, {name: value for name, value in environment.items() if value}) == binds


@pytest.mark.parametrize("inherited", ["", "ignore::UserWarning,ignore::FutureWarning"])
def test_warnings_of_transformer_engine_are_shown(inherited: str) -> None:
    """They are about settings that cost speed. Megatron-Core's are about optional packages."""
    shown = run_python("-c", WARN, PYTHONWARNINGS=inherited).stderr
    assert "from transformer_engine.pytorch.module.base" in shown and "from megatron" not in shown
