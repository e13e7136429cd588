"""Memory estimates of the local backend: dense attention masks, whole keys and values under context parallelism."""

from __future__ import annotations

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.memory import cost, local_mask_bytes
from tests.support import tiny

ARCH = Architecture.from_hf(tiny.model_config(), where="test")  # 4 layers, 4 groups of 8
LONG = 131072


def test_dense_masks_of_long_trajectories() -> None:
    assert local_mask_bytes(ARCH, ParallelLayout(context=8), LONG) == 2**30
    assert local_mask_bytes(ARCH, ParallelLayout(), LONG) == 0, "causal attention needs no mask"
    windows = Architecture.from_hf(tiny.model_config("mistral", sliding_window=64), where="test")
    assert local_mask_bytes(windows, ParallelLayout(), 1000) == 1000**2
    assert local_mask_bytes(windows, ParallelLayout(), 64) == 0, "the window covers the trajectory"


def test_whole_keys_and_values_are_counted() -> None:
    layout = ParallelLayout(context=4, tensor=2, sequence=True)
    sizes = [
        cost(ARCH, layout, seq_length=1024, micro_batch_size=1, micro_batches=1, local=local).activations
        for local in (False, True)
    ]
    own, bf16, groups = 1024 // 4, 2, 2  # groups of this tensor-parallel rank
    missing = 3 * own  # tokens of the other context-parallel ranks
    assert sizes[1] - sizes[0] == ARCH.num_layers * bf16 * 2 * groups * 8 * missing
