"""Inside a micro-batch the host never waits for the GPU: counted by the operations that would make it wait."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.objectives.breakdown import break_down
from megatron_iwsft.objectives.functions import OBJECTIVES, Settings
from megatron_iwsft.testing import run_distributed
from tests.support import tiny
from tests.support.transformer_engine import as_on_hopper, te

pytestmark = pytest.mark.parallel

aten = torch.ops.aten
# What `torch.cuda.set_sync_debug_mode` reports: results whose values or number the host needs, and tensors made from host values.
WAITS = {
    *(
        aten._local_scalar_dense,
        aten.nonzero,
        aten.masked_select,
        aten.equal,
        aten.is_nonzero,
        aten._unique2,
        aten.unique_dim,
    ),
    *(aten.lift_fresh, aten.bincount, aten.argwhere),
}
# Of the local backend: they need the segments' boundaries on the host, once per row. Transformer Engine's kernels take them on the GPU.
LOCAL = {("moe.py", "boundaries"), ("rope_utils.py", "_apply_rotary_pos_emb_thd")}


class CountWaits(TorchDispatchMode):
    """(file, function) of the package or of Megatron-Core → number of operations there that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket is aten.index and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        repeats = func.overloadpacket is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if func.overloadpacket in WAITS or by_mask or repeats:
            self._count()
        return func(*args, **kwargs or {})

    def _count(self) -> None:
        frames = [f for f in traceback.extract_stack() if "megatron" in f.filename and "cpu_backend" not in f.filename]
        self.found[Path(frames[-1].filename).name, frames[-1].name] += 1

    @contextmanager
    def of_methods(self) -> Iterator[None]:
        """Also count copies to the host, of which a tensor on a CPU dispatches nothing."""

        def counted(method: Any) -> Any:
            def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self._count()
                return method(tensor, *args, **kwargs)

            return call

        with ExitStack() as patches:
            for name in ("tolist", "cpu", "numpy"):
                patches.enter_context(mock.patch.object(torch.Tensor, name, counted(getattr(torch.Tensor, name))))
            yield


def waits(
    platform: Any, corpus_dir: str, objective: str, on_gpu: bool = False, backend: Any = "local"
) -> dict[tuple[str, str], int]:
    """Of one micro-batch, forward and backward. on_gpu: without the trained positions found on the host."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    corpus, parallel = Corpus.open(corpus_dir), platform.parallel()
    arch = Architecture.from_hf(tiny.model_config(num_hidden_layers=2), where="test")
    policy = build_model(arch, parallel, platform, ModelSettings(torch.bfloat16, backend=backend))
    load_weights(policy, RandomInit(arch, 5), parallel)
    chunks = wrap_for_gradients(policy, Optimizer(distributed=False))
    options = dict(seq_length=128, packing="best_fit", global_batch_size=1, quality=Quality("weight"), seed=3)
    groups = break_down(corpus.scores, corpus.sources())
    assert groups is not None
    builder = BatchBuilder(
        corpus,
        Sampler(corpus.lengths, corpus.scores, **options),
        RowShape.of(tensor=1, context=1, row_length=128),
        micro_batch_size=1,
        reference=lambda i: (corpus.mask(i) * -5.0).astype("float32"),
        groups=groups.of,
    )
    step = TrainStep(chunks, parallel, platform.device, OBJECTIVES[objective], Settings(), breakdown=groups)
    (batch,) = builder.at_step(0)
    assert batch.num_segments > 2
    batch = replace(batch, trained=None) if on_gpu else batch
    step._start_totals()
    with CountWaits() as counted, counted.of_methods():
        output, loss = step._forward_step(iter([batch]), chunks[0])
        loss(output)[0].backward()
    return dict(counted.found)


def waits_with_te(platform: Any, corpus_dir: str) -> dict[tuple[str, str], int]:
    with as_on_hopper():
        return waits(platform, corpus_dir, "iw_sft", backend="transformer_engine")


@te
def test_transformer_engines_layers_wait_for_nothing(tmp_path: Path) -> None:
    """Attention and rotation are the local backend's here, with its boundaries."""
    corpus = tiny.token_corpus(tmp_path, [20 + (i * 37) % 30 for i in range(20)], scores=True)
    found = run_distributed(waits_with_te, 1, str(corpus.directory))[0]
    assert set(found) == LOCAL, found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_host_waits_for_nothing_but_the_local_backends_boundaries(objective: str, tmp_path: Path) -> None:
    corpus = tiny.token_corpus(tmp_path, [20 + (i * 37) % 30 for i in range(20)], scores=True)
    found = run_distributed(waits, 1, str(corpus.directory), objective)[0]
    assert set(found) == LOCAL, found


def test_the_count_finds_positions_that_are_left_to_the_gpu(tmp_path: Path) -> None:
    corpus = tiny.token_corpus(tmp_path, [20 + (i * 37) % 30 for i in range(20)], scores=True)
    found = run_distributed(waits, 1, str(corpus.directory), "sft", True)[0]
    assert found["logprob.py", "forward"] == 1
