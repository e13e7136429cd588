"""The same loss and gradients at every layout, against an independent model in plain torch.

`bash tests/run.sh -s tests/test_layouts.py` prints the table: layout × objective → relative error of loss and worst gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import pytest
import torch

from megatron_iwsft.config import Optimizer
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.dataset import BatchBuilder, RowShape
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.model.architecture import Architecture
from megatron_iwsft.model.hf import RandomInit
from megatron_iwsft.model.weights import shapes
from megatron_iwsft.objectives import Settings
from megatron_iwsft.testing import run_distributed, whole_gradients
from tests import plain, tiny

TOLERANCE = 1e-5
LENGTHS = [37, 12, 64, 5, 29, 50, 18, 41, 33, 9, 27, 60]
SEQ_LENGTH = 64


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    sequence: bool = False
    packing: str = "best_fit"
    micro_batch_size: int = 1
    tied: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    recompute: str = "none"
    overlap: bool = False

    def __str__(self) -> str:
        names = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in names.items()) or "plain"


@dataclass(frozen=True)
class Objective:
    name: str = "iw_sft"
    level: str = "sequence"
    normalize: str = "tokens"
    temperature: float = 1.0
    clip: tuple[float, float] = (0.2, 3.0)

    def __str__(self) -> str:
        return f"{self.name}/{self.level}/{self.normalize}"


LAYOUTS = {
    1: [
        Layout(),
        Layout(packing="none", micro_batch_size=2),
        Layout(micro_batch_size=4, tied=True),
        Layout(recompute="selective"),
        Layout(recompute="full"),
        Layout(overlap=True),
    ],
    2: [
        Layout(tensor=2),
        Layout(tensor=2, sequence=True, tied=True, recompute="full"),
        Layout(pipeline=2, tied=True),
        Layout(pipeline=2, virtual=2, tied=True),
        Layout(pipeline=2, layers_per_stage=(5, 3)),
        Layout(pipeline=2, virtual=2, layers_per_stage=(1, 2, 4, 1), recompute="selective"),
        Layout(context=2),
        Layout(context=2, packing="none", micro_batch_size=2, recompute="full"),
        Layout(),  # data parallel 2
        Layout(packing="none", overlap=True),
    ],
    4: [
        Layout(tensor=4),  # two key-value heads over four ranks
        Layout(tensor=4, sequence=True, tied=True),
        Layout(tensor=2, sequence=True, pipeline=2),
        Layout(tensor=2, pipeline=2, virtual=2, tied=True),
        Layout(tensor=2, sequence=True, context=2),
        Layout(tensor=2, overlap=True),  # data parallel 2
        Layout(pipeline=4, tied=True),
        Layout(pipeline=4, virtual=2),
        Layout(pipeline=2, context=2, tied=True),
        Layout(pipeline=2, micro_batch_size=2),  # data parallel 2
        Layout(context=4),
        Layout(context=2, packing="none"),  # data parallel 2
        Layout(micro_batch_size=2),  # data parallel 4
    ],
}
OBJECTIVES = [Objective("sft"), Objective(normalize="weights"), Objective(level="token", normalize="sequences")]
MODEL = dict(num_hidden_layers=8, hidden_size=32, intermediate_size=64, num_attention_heads=8, num_key_value_heads=2)


def reference_logprobs(corpus: Corpus):
    """Made-up reference log-probs, near what a random model gives, so that weights spread around 1."""

    def read(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        return (
            rng.normal(-5.7 + 0.3 * rng.standard_normal(), 0.5, int(corpus.lengths[i])) * (corpus.mask(i) == 1)
        ).astype(np.float32)

    return read


def sampler(corpus: Corpus, packing: str) -> Sampler:
    """Twelve trajectories make a partial last global batch; step 0 is compared."""
    return Sampler(
        corpus.lengths,
        corpus.scores,
        seq_length=SEQ_LENGTH,
        packing=packing,
        global_batch_size=8,
        quality=Quality("weight"),
        seed=3,
    )


def run_layouts(platform, corpus_dir: str, layouts: list[Layout], objectives: list[Objective]):
    """In every process: loss and whole gradients of step 0 for each layout and objective."""
    from megatron_iwsft.model.build import ModelSettings, build_model, load_weights
    from megatron_iwsft.optim import wrap_for_gradients
    from megatron_iwsft.step import TrainStep

    corpus = Corpus.open(corpus_dir)
    out = {}
    for layout in layouts:
        parallel = platform.parallel(
            tensor=layout.tensor, pipeline=layout.pipeline, context=layout.context, virtual_pipeline=layout.virtual
        )
        arch = Architecture.from_hf(tiny.model_config(**MODEL, tie_word_embeddings=layout.tied), where="test")
        settings = ModelSettings(
            sequence_parallel=layout.sequence, layers_per_stage=layout.layers_per_stage, recompute=layout.recompute
        )
        model = build_model(arch, parallel, platform, settings)
        load_weights(model, RandomInit(arch, 5), parallel)
        chunks = wrap_for_gradients(model, Optimizer(distributed=False, overlap_grad_reduce=layout.overlap))
        row = layout.micro_batch_size * SEQ_LENGTH if layout.packing == "best_fit" else None
        builder = BatchBuilder(
            corpus,
            sampler(corpus, layout.packing),
            RowShape.of(tensor=layout.tensor, context=layout.context, row_length=row),
            micro_batch_size=layout.micro_batch_size,
            data_rank=parallel.dp.rank(),
            data_size=parallel.dp.size(),
            context_rank=parallel.cp.rank(),
            context_size=parallel.cp.size(),
            reference=reference_logprobs(corpus),
        )
        for objective in objectives:
            settings = Settings(objective.level, objective.temperature, objective.clip, objective.normalize)
            step = TrainStep(chunks, parallel, platform.device, objective.name, settings)
            loss = step.forward_backward(builder.at_step(0))["loss"]
            out[layout, objective] = (loss, whole_gradients(chunks, parallel))
    return out if platform.rank == 0 else None


@lru_cache
def expected(corpus_dir: str, packing: str, tied: bool, objective: Objective):
    """Loss and gradients of the same global batch from the plain model, in float64."""
    corpus = Corpus.open(corpus_dir)
    config = tiny.model_config(**MODEL, tie_word_embeddings=tied)
    arch = Architecture.from_hf(config, where="test")
    source = RandomInit(arch, 5)
    weights = {n: source.read(n, (0, 0, s[0])).double().requires_grad_() for n, s in shapes(arch).items()}
    reference = reference_logprobs(corpus)
    batch = []
    for i in np.concatenate(sampler(corpus, packing).packs_at(0)).tolist():
        tokens = torch.from_numpy(corpus.tokens(i).astype(np.int64))
        mask = torch.from_numpy(corpus.mask(i)[1:].astype(np.int64))
        batch.append(
            (
                plain.logprobs(weights, config, tokens),
                torch.from_numpy(reference(i)[1:]),
                mask,
                float(np.float32(corpus.scores[i])),
            )
        )
    loss = plain.loss(batch, vars(objective))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return loss.item(), dict(zip(weights, gradients, strict=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return tiny.token_corpus(tmp_path_factory.mktemp("layouts"), LENGTHS, scores=True)


@pytest.mark.parallel
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_agree_with_plain_torch(world_size: int, corpus: Corpus) -> None:
    found = run_distributed(run_layouts, world_size, str(corpus.directory), LAYOUTS[world_size], OBJECTIVES)[0]
    print(
        f"\n{'layout, of ' + str(world_size) + ' processes':64} {'objective':26} {'loss off by':>11} {'worst gradient':>14}"
    )
    complaints = []
    for (layout, objective), (loss, gradients) in found.items():
        want_loss, want = expected(str(corpus.directory), layout.packing, layout.tied, objective)
        loss_error = abs(loss - want_loss) / abs(want_loss)
        errors = {name: relative_error(gradients[name], gradient) for name, gradient in want.items()}
        print(f"{layout!s:64} {objective!s:26} {loss_error:11.1e} {max(errors.values()):14.1e}")
        if not loss_error <= TOLERANCE:
            complaints.append(f"[{layout}] {objective}: loss {loss:.8f}, expected {want_loss:.8f}")
        complaints += [
            f"[{layout}] {objective}: {name} off by {error:.2e}; norms {gradients[name].norm():.6g}, expected {want[name].norm():.6g}"
            for name, error in errors.items()
            if not error <= TOLERANCE
        ]
    assert not complaints, "\n".join(complaints)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()
