"""Loss and gradients at every layout, against an independent model in plain torch and float64.

`bash tests/run.sh -n0 -s tests/train/test_layouts.py` prints for each layout and objective the relative errors of the loss and of the
worst gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import pytest
import torch

from megatron_iwsft.config.schema import Optimizer
from megatron_iwsft.data.batch_builder import BatchBuilder, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.hf.mapping import shapes
from megatron_iwsft.objectives.functions import OBJECTIVES, Settings
from megatron_iwsft.testing import whole_gradients
from tests.support import plain_model, tiny
from tests.support.jobs import result, run_each

TOLERANCE = 1e-5
LENGTHS = [37, 12, 64, 5, 29, 50, 18, 41, 33, 9, 27, 60]
SEQ_LENGTH = 64


@dataclass(frozen=True)
class Case:
    """Parallel degrees and other settings that must not change a number, and the model. expert None: a dense model."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int | None = None
    sequence: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    packing: str = "best_fit"
    micro_batch_size: int = 1
    tied: bool = False
    recompute: str = "none"
    overlap: bool = False
    family: str = "qwen"
    layers: int = 2
    turn_weights: bool = False

    @property
    def alone(self) -> Case:
        """The same model and batches on one process, without what must not change a number."""
        expert = self.expert and 1
        same = {name: getattr(self, name) for name in ("packing", "tied", "family", "layers", "turn_weights")}
        return Case(expert=expert, **same)

    @property
    def degrees(self) -> dict:
        names = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "layers_per_stage")
        return {name: getattr(self, name) for name in names} | {"expert": self.expert or 1}

    def __str__(self) -> str:
        names = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in names.items()) or "plain"


@dataclass(frozen=True)
class Loss:
    """A built-in objective with settings."""

    name: str
    settings: Settings

    def __str__(self) -> str:
        return f"{self.name}/{self.settings.level}/{self.settings.normalize}"


CASES = {
    1: [
        Case(),
        Case(packing="none", micro_batch_size=2),
        Case(micro_batch_size=4, tied=True),
        Case(recompute="selective"),
        Case(recompute="full"),
        Case(overlap=True),
        Case(expert=1, micro_batch_size=2),
        Case(expert=1, packing="none", tied=True, recompute="full"),
        Case(family="gemma3_text", micro_batch_size=2),
        Case(turn_weights=True, micro_batch_size=2),
    ],
    2: [
        Case(tensor=2),
        Case(tensor=2, sequence=True, tied=True, recompute="full"),
        Case(pipeline=2, tied=True),
        Case(pipeline=2, virtual_pipeline=2, tied=True, layers=4),
        Case(pipeline=2, layers_per_stage=(3, 1), layers=4),
        Case(pipeline=2, virtual_pipeline=2, layers_per_stage=(1, 2, 4, 1), recompute="selective", layers=8),
        Case(context=2),
        Case(context=2, packing="none", micro_batch_size=2, recompute="full"),
        Case(),  # data parallel 2
        Case(packing="none", overlap=True),
        Case(expert=2),
        Case(expert=1, tensor=2, sequence=True, packing="none"),
        Case(expert=1, pipeline=2, virtual_pipeline=2, recompute="full", layers=4),
        Case(family="gemma3_text", tensor=2, sequence=True, tied=True, recompute="full"),
        Case(family="gemma3_text", pipeline=2, virtual_pipeline=2, layers=4),
        Case(family="smollm3", context=2, packing="none"),
        Case(context=2, turn_weights=True),
        Case(pipeline=2, turn_weights=True),
    ],
    4: [
        Case(tensor=4),  # two key-value heads over four ranks
        Case(tensor=4, sequence=True, tied=True),
        Case(tensor=2, sequence=True, pipeline=2),
        Case(tensor=2, pipeline=2, virtual_pipeline=2, tied=True, layers=4),
        Case(tensor=2, sequence=True, context=2),
        Case(tensor=2, overlap=True),  # data parallel 2
        Case(pipeline=4, tied=True, layers=4),
        Case(pipeline=4, virtual_pipeline=2, layers=8),
        Case(pipeline=2, context=2, tied=True),
        Case(pipeline=2, micro_batch_size=2),  # data parallel 2
        Case(context=4),
        Case(context=2, packing="none"),  # data parallel 2
        Case(micro_batch_size=2),  # data parallel 4
        Case(expert=2, tensor=2, sequence=True, pipeline=2, tied=True),
        Case(expert=4, tensor=2, sequence=True, context=2),
        Case(expert=2, micro_batch_size=2),  # data parallel 4
        Case(family="gemma3_text", tensor=2, pipeline=2, tied=True),
        Case(tensor=2, sequence=True, context=2, turn_weights=True),
        Case(family="smollm3", tensor=2, sequence=True, context=2, recompute="selective"),
    ],
    8: [
        Case(tensor=4, sequence=True, pipeline=2, virtual_pipeline=2, tied=True, layers=4),
        Case(tensor=2, sequence=True, pipeline=2, context=2, packing="none"),
        Case(expert=4, tensor=2, sequence=True, pipeline=2, micro_batch_size=2),  # data parallel 2
    ],
}
CLIP = (0.2, 3.0)
LOSSES = (
    Loss("sft", Settings(clip=CLIP)),
    Loss("iw_sft", Settings(clip=CLIP, normalize="weights")),
    Loss("iw_sft", Settings("token", clip=CLIP, normalize="sequences")),
    Loss("iw_sft", Settings("trajectory", temperature=0.1, clip=CLIP, normalize="sequence_weights")),
    Loss("dft", Settings(clip=CLIP)),
    Loss("psft", Settings("token", clip=(0.8, 1.28))),
)
FAMILIES = {
    "gemma3_text": dict(
        model_type="gemma3_text",
        head_dim=8,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=6,
        sliding_window=24,
        sliding_window_pattern=2,
        rope_local_base_freq=500.0,
    ),
    "smollm3": dict(model_type="smollm3", no_rope_layers=[1, 0]),
}
ROUTER_BALANCE = 0.1  # for experts, where the denominator is known before the forward pass


class TurnsOfDifferentWeights:
    """A corpus whose trained runs of tokens have weights."""

    has_turn_weights = True

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __getattr__(self, name: str):
        return getattr(self._corpus, name)

    def token_weights(self, i: int) -> np.ndarray:
        mask = self._corpus.mask(i)
        run = np.cumsum(np.diff(mask, prepend=np.uint8(0)) == 1)
        return np.array([0.25, 3.0, 1.0], np.float32)[(run + i) % 3] * mask


def open_corpus(directory: str, case: Case):
    corpus = Corpus.open(directory)
    return TurnsOfDifferentWeights(corpus) if case.turn_weights else corpus


def model(case: Case) -> dict:
    changes = dict(num_hidden_layers=case.layers, hidden_size=32, num_attention_heads=8, num_key_value_heads=2)
    if case.expert is None:
        family = FAMILIES.get(case.family, {})
        return tiny.model_config(**changes, intermediate_size=64, tie_word_embeddings=case.tied) | family
    moe = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, head_dim=8)
    return tiny.model_config("qwen3_moe", **changes, **moe, tie_word_embeddings=case.tied)


def router_balance(case: Case, loss: Loss) -> float:
    return 0.0 if case.expert is None or loss.settings.normalize.endswith("weights") else ROUTER_BALANCE


def reference_logprobs(corpus: Corpus):
    """Random reference log-probs close to those of a random model, so that weights are spread around 1."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        return (
            rng.normal(-5.7 + 0.3 * rng.standard_normal(), 0.5, int(corpus.lengths[i])) * (corpus.mask(i) == 1)
        ).astype(np.float32)

    return read


def compared_step(packing: str) -> int:
    """The one partial global batch: six packs of eight, or after eight trajectories the last four."""
    return 0 if packing == "best_fit" else 1


def sampler(corpus: Corpus, packing: str) -> Sampler:
    return Sampler(
        corpus.lengths,
        corpus.scores,
        seq_length=SEQ_LENGTH,
        packing=packing,
        global_batch_size=8,
        quality=Quality("weight"),
        seed=3,
    )


def batches(corpus: Corpus, case: Case, data_rank: int, data_size: int, context_rank: int = 0) -> BatchBuilder:
    row = case.micro_batch_size * SEQ_LENGTH if case.packing == "best_fit" else None
    return BatchBuilder(
        corpus,
        sampler(corpus, case.packing),
        RowShape.of(tensor=case.tensor, context=case.context, row_length=row),
        micro_batch_size=case.micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        context_rank=context_rank,
        context_size=case.context,
        reference=reference_logprobs(corpus),
    )


def run_case(platform, corpus_dir: str, case: Case, losses: Sequence[Loss] = LOSSES) -> dict[Loss, tuple]:
    """((loss, router balance, effective sample size), complete gradients) of one global batch by objective, in a job of processes."""
    from megatron_iwsft.model.gpt import ModelSettings, build_model
    from megatron_iwsft.model.parameters import load_weights
    from megatron_iwsft.train.optim import wrap_for_gradients
    from megatron_iwsft.train.step import TrainStep

    corpus, parallel = open_corpus(corpus_dir, case), platform.parallel(**case.degrees)
    arch = Architecture.from_hf(model(case), where="test")
    policy = build_model(arch, parallel, platform, ModelSettings(recompute=case.recompute))
    load_weights(policy, RandomInit(arch, 5), parallel)
    chunks = wrap_for_gradients(policy, Optimizer(distributed=False, overlap_grad_reduce=case.overlap))
    builder = batches(corpus, case, parallel.dp.rank(), parallel.dp.size(), parallel.cp.rank())
    out = {}
    for loss in losses:
        step = TrainStep(
            chunks,
            parallel,
            platform.device,
            OBJECTIVES[loss.name],
            loss.settings,
            router_balance=router_balance(case, loss),
        )
        metrics = step.forward_backward(builder.at_step(compared_step(case.packing)))
        values = metrics["loss"], metrics.get("router_balance", 0.0), metrics.get("weight_ess", 0.0)
        out[loss] = values, whole_gradients(chunks, parallel)
    return out


@lru_cache
def expected(corpus_dir: str, case: Case, losses: Sequence[Loss] = LOSSES) -> dict[Loss, tuple]:
    """What `run_case` returns, from the plain model in float64: one forward pass for all objectives. case: one that is `alone`."""
    corpus, config = open_corpus(corpus_dir, case), model(case)
    arch = Architecture.from_hf(config, where="test")
    source = RandomInit(arch, 5)
    weights = {n: source.read(n, (0, 0, s[0])).double().requires_grad_() for n, s in shapes(arch).items()}
    reference = reference_logprobs(corpus)
    batch, balances = [], []
    for i in np.concatenate(sampler(corpus, case.packing).packs_at(compared_step(case.packing))).tolist():
        tokens = torch.from_numpy(corpus.tokens(i).astype(np.int64))
        mask = torch.from_numpy(corpus.mask(i)[1:].astype(np.int64))
        routed: list = []
        logprobs = plain_model.logprobs(weights, config, tokens, routed)
        quality = float(np.float32(corpus.scores[i]))
        if case.turn_weights:
            quality *= torch.from_numpy(corpus.token_weights(i)[1:]).double()
        batch.append((logprobs, torch.from_numpy(reference(i)[1:]), mask, quality))
        balances.append(plain_model.router_balance(routed, config, torch.cat([mask, mask.new_zeros(1)])))
    out = {}
    for loss in losses:
        units = [int(mask.sum()) if loss.settings.normalize == "tokens" else 1 for _, _, mask, _ in batch]
        balance = sum(unit * of_one for unit, of_one in zip(units, balances, strict=True)) / sum(units)
        value, coefficient = (
            plain_model.loss(batch, {"name": loss.name, **vars(loss.settings)}),
            router_balance(case, loss),
        )
        gradients = torch.autograd.grad(value + coefficient * balance, list(weights.values()), retain_graph=True)
        per_layer = float(balance) / config["num_hidden_layers"] if coefficient else 0.0
        size = effective_sample_size(loss, value, batch) if OBJECTIVES[loss.name].weighted else 0.0
        out[loss] = (value.item(), per_layer, size), dict(zip(weights, gradients, strict=True))
    return out


def effective_sample_size(loss: Loss, value: torch.Tensor, batch: list[tuple]) -> float:
    """(Σc)²/(nΣc²), c the gradient by a token's log-prob, or by all of a trajectory's where those have one weight."""
    gradients = torch.autograd.grad(value, [logprobs for logprobs, *_ in batch], retain_graph=True)
    masks = [mask == 1 for _, _, mask, _ in batch]
    if loss.settings.level == "token" or OBJECTIVES[loss.name].per_token:
        c = torch.cat([gradient[mask] for gradient, mask in zip(gradients, masks, strict=True)])
    else:
        c = torch.stack([gradient.sum() for gradient, mask in zip(gradients, masks, strict=True) if mask.any()])
    return (c.sum() ** 2 / len(c) / (c**2).sum()).item()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return tiny.token_corpus(tmp_path_factory.mktemp("layouts"), LENGTHS, scores=True)


class Sweep:
    """The cases of CASES: loss and gradients of each, computed in one job for each number of processes when first asked for."""

    def __init__(self, corpus: Corpus) -> None:
        self.directory, self._outcomes = str(corpus.directory), {}

    def __call__(self, world_size: int, case: Case) -> dict[Loss, tuple]:
        if world_size not in self._outcomes:
            cases = {str(c): (self.directory, c) for c in CASES[world_size]}
            self._outcomes[world_size] = run_each(run_case, world_size, cases)
        return result(self._outcomes[world_size], str(case))


@pytest.fixture(scope="module")
def sweep(corpus: Corpus) -> Sweep:
    return Sweep(corpus)


ALL_CASES = [
    pytest.param(n, case, id=f"{n}-{case}", marks=[pytest.mark.exhaustive] if n > 2 else [])
    for n, cases in CASES.items()
    for case in cases
]


@pytest.mark.parallel
@pytest.mark.numerics
@pytest.mark.parametrize(("world_size", "case"), ALL_CASES)
def test_a_layout_agrees_with_plain_torch(world_size: int, case: Case, sweep: Sweep) -> None:
    complaints, wanted = [], expected(sweep.directory, case.alone)
    for loss, (losses, gradients) in sweep(world_size, case).items():
        want_losses, want = wanted[loss]
        loss_error = max(abs(x - y) / abs(y) if y else abs(x) for x, y in zip(losses, want_losses, strict=True))
        errors = {name: relative_error(gradients[name], gradient) for name, gradient in want.items()}
        print(f"\n{world_size} {case!s:70} {loss!s:26} {loss_error:8.1e} {max(errors.values()):8.1e}", end="")
        if not loss_error <= TOLERANCE:
            complaints.append(f"{loss}: loss, router balance, effective sample size {losses}, expected {want_losses}")
        complaints += [
            f"{loss}: {name} off by {error:.2e}; norms {gradients[name].norm():.6g}, expected {want[name].norm():.6g}"
            for name, error in errors.items()
            if not error <= TOLERANCE
        ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_compared_batch_is_partial_and_uneven(packing: str, corpus: Corpus) -> None:
    case, step = Case(packing=packing), compared_step(packing)
    trained = [[float(batch.mask.sum()) for batch in batches(corpus, case, rank, 2).at_step(step)] for rank in range(2)]
    assert 0.0 in trained[0] + trained[1], "no micro-batch is all padding"
    assert sum(trained[0]) != sum(trained[1])
    alone = [[float(b.mask.sum()) for b in batches(corpus, case, rank, 8).at_step(step)] for rank in range(8)]
    assert [0.0] in alone, "no rank has padding only"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
