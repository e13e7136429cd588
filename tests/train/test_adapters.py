"""Low-rank adapters: loss and every gradient at every layout, against an independent model in plain torch and float64.

`bash tests/run.sh -s tests/train/test_adapters.py` prints for each layout the relative errors of the loss and of the worst gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.objectives.functions import OBJECTIVES, Settings
from megatron_iwsft.testing import whole_gradients
from tests.support import plain_model, tiny
from tests.support.adapters import TrainedAdapters, effective, in_double
from tests.support.jobs import result, run_each
from tests.train.test_layouts import (
    LENGTHS,
    TOLERANCE,
    Case,
    Loss,
    batches,
    compared_step,
    model,
    reference_logprobs,
    relative_error,
    sampler,
)

CASES = {
    1: [Case(), Case(recompute="full", tied=True)],
    2: [
        Case(tensor=2),
        Case(tensor=2, sequence=True, tied=True, recompute="full"),
        Case(pipeline=2, virtual_pipeline=2, tied=True, recompute="selective", layers=4),
        Case(context=2, packing="none", micro_batch_size=2),
        Case(overlap=True),  # data parallel 2
        Case(expert=2),
        Case(expert=1, tensor=2, sequence=True),
        Case(family="gemma3_text", tensor=2, sequence=True),
    ],
    4: [
        Case(tensor=4),  # two key-value heads over four ranks
        Case(tensor=4, sequence=True, recompute="full"),
        Case(tensor=2, sequence=True, pipeline=2, tied=True),
        Case(tensor=2, sequence=True, context=2),
        Case(pipeline=4, virtual_pipeline=2, recompute="full", layers=8),
        Case(pipeline=2, context=2, tied=True),
        Case(tensor=2, overlap=True),  # data parallel 2
        Case(expert=2, tensor=2, sequence=True, pipeline=2, tied=True),
        Case(expert=4, tensor=2, sequence=True, context=2),
    ],
}
LOSS = Loss("iw_sft", Settings("token", clip=(0.2, 3.0), normalize="sequences"))


def adapters(case: Case) -> AdapterSettings:
    arch = Architecture.from_hf(model(case), where="test")
    targets = None if case.expert is None else ("qkv", "proj", "experts")
    return AdapterSettings.of(arch, rank=3, alpha=6.0, targets=targets)


def run_case(platform, corpus_dir: str, case: Case) -> tuple[float, dict, dict[str, int]]:
    """Loss and complete gradients of the adapters of one global batch; and how many parameters are trained and are not."""
    from megatron_iwsft.model.adapters import add_adapters
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_adapters, load_weights
    from megatron_iwsft.train.optim import wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    corpus, parallel = Corpus.open(corpus_dir), platform.parallel(**case.degrees)
    arch = Architecture.from_hf(model(case), where="test")
    policy = build_model(arch, parallel, platform, ModelSettings(recompute=case.recompute))
    load_weights(policy, RandomInit(arch, 5), parallel)
    add_adapters(policy, adapters(case), parallel)
    load_adapters(policy, adapters(case), TrainedAdapters(arch, adapters(case), 5), parallel)
    chunks = wrap_for_gradients(policy, Optimizer(distributed=False, overlap_grad_reduce=case.overlap))
    builder = batches(corpus, case, parallel.dp.rank(), parallel.dp.size(), parallel.cp.rank())
    step = TrainStep(chunks, parallel, platform.device, OBJECTIVES[LOSS.name], LOSS.settings)
    metrics = step.forward_backward(builder.at_step(compared_step(case.packing)))
    frozen = [n for chunk in policy for n, p in chunk.named_parameters() if not p.requires_grad]
    assert frozen and not any(hasattr(p, "main_grad") for c in policy for p in c.parameters() if not p.requires_grad)
    return metrics["loss"], whole_gradients(chunks, parallel)


@lru_cache
def expected(corpus_dir: str, case: Case):
    """Loss and gradients of the adapters from the plain model, in float64. case: one that is `alone`."""
    corpus, config = Corpus.open(corpus_dir), model(case)
    arch = Architecture.from_hf(config, where="test")
    source = RandomInit(arch, 5)
    weights = {n: source.read(n, (0, 0, s[0])).double() for n, s in shapes(arch).items()}
    tensors = in_double(arch, adapters(case))
    reference, batch = reference_logprobs(corpus), []
    for i in np.concatenate(sampler(corpus, case.packing).packs_at(compared_step(case.packing))).tolist():
        tokens = torch.from_numpy(corpus.tokens(i).astype(np.int64))
        mask = torch.from_numpy(corpus.mask(i)[1:].astype(np.int64))
        logprobs = plain_model.logprobs(effective(weights, tensors, adapters(case)), config, tokens)
        batch.append((logprobs, torch.from_numpy(reference(i)[1:]), mask, float(np.float32(corpus.scores[i]))))
    value = plain_model.loss(batch, {"name": LOSS.name, **vars(LOSS.settings)})
    return value.item(), dict(zip(tensors, torch.autograd.grad(value, list(tensors.values())), strict=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return tiny.token_corpus(tmp_path_factory.mktemp("adapters"), LENGTHS, scores=True)


@pytest.fixture(scope="module")
def outcomes(corpus: Corpus):
    """The cases of a world size, computed in one job when first asked for."""

    @lru_cache
    def of(world_size: int) -> dict:
        return run_each(run_case, world_size, {str(c): (str(corpus.directory), c) for c in CASES[world_size]})

    return of


def in_order(cases: dict[int, Sequence[Case]]) -> list:
    return [
        pytest.param(n, case, id=f"{n}-{case}", marks=[pytest.mark.exhaustive] if n > 2 else [])
        for n, listed in cases.items()
        for case in listed
    ]


@pytest.mark.parallel
@pytest.mark.parametrize(("world_size", "case"), in_order(CASES))
def test_a_layout_agrees_with_plain_torch(world_size: int, case: Case, corpus: Corpus, outcomes) -> None:
    loss, gradients = result(outcomes(world_size), str(case))
    want_loss, want = expected(str(corpus.directory), case.alone)
    errors = {name: relative_error(gradients[name], gradient) for name, gradient in want.items()}
    print(
        f"\n{world_size} {case!s:70} {abs(loss - want_loss) / abs(want_loss):8.1e} {max(errors.values()):8.1e}", end=""
    )
    assert gradients.keys() == want.keys()
    assert abs(loss - want_loss) <= TOLERANCE * abs(want_loss)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
