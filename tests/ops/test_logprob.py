"""The log-prob operator against full logits in float64 (value, entropy, both gradients), and the number of its collectives."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.data.batch import IGNORE
from megatron_iwsft.ops.logits import logits_buffer
from megatron_iwsft.testing import run_distributed

H, PADDED, T = 24, 384, 16
VOCABULARIES = (300, 280)  # with four ranks of 96 rows, the last rank has 12 columns, or only padding
TRAINED = ("all", "none", "one", "ragged")


def case(trained: str, vocabulary: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = torch.randn(PADDED, H, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (T,), generator=generator)
    keep = {
        "all": torch.ones(T),
        "none": torch.zeros(T),
        "one": torch.eye(T)[3],
        "ragged": torch.rand(T, generator=generator),
    }[trained]
    targets[keep < 0.5] = IGNORE
    grad = torch.randn(T, generator=generator)
    return hidden, weight, targets, grad


def full_logits(hidden, weight, targets, grad, vocabulary):
    """(log-probs, entropy, d hidden, d weight) in float64, over the vocabulary without padding."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    trained = targets != IGNORE
    logprobs = torch.log_softmax(hidden @ weight[:vocabulary].T, dim=-1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * trained
    (picked * grad.double()).sum().backward()
    entropy = -(logprobs.exp() * logprobs).sum(1).detach() * trained
    return picked.detach(), entropy, hidden.grad, weight.grad


def operator(group, inputs, vocabulary, *, chunk_size=None, sequence_parallel=False, main_grad=False, entropy=False):
    """(log-probs, entropy, d hidden, d weight) on this rank."""
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    hidden, weight, targets, grad = inputs
    if sequence_parallel:
        hidden = hidden.chunk(group.size())[group.rank()].clone()
    weight = weight.chunk(group.size())[group.rank()].clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    if main_grad:
        weight.main_grad = torch.ones(weight.shape)
    entropies = torch.full((T,), torch.nan) if entropy else None
    logprobs = vocab_parallel_logprob(
        hidden,
        weight,
        targets,
        group=group,
        vocab_size=vocabulary,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        entropy=entropies,
    )
    (logprobs * grad).sum().backward()
    if main_grad:
        assert weight.grad_added_to_main_grad and not weight.grad.any()
    return logprobs.detach(), entropies, hidden.grad, weight.main_grad - 1 if main_grad else weight.grad


def run_cases(platform, cases):
    group = platform.parallel(tensor=platform.world_size).tp
    return [
        operator(
            group,
            case(trained, vocabulary),
            vocabulary,
            chunk_size=chunk_size,
            sequence_parallel=sequence_parallel,
            main_grad=main_grad,
            entropy=main_grad,
        )
        for trained, vocabulary, sequence_parallel, chunk_size, main_grad in cases
    ]


def error(found, expected) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3))


@pytest.mark.parallel
@pytest.mark.numerics
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_value_entropy_and_gradients_match_full_logits(world_size: int) -> None:
    cases = list(itertools.product(TRAINED, VOCABULARIES, (False, True), (1, 5, None), (False, True)))
    answers = run_distributed(run_cases, world_size, cases)
    for i, (trained, vocabulary, sequence_parallel, _, with_entropy) in enumerate(cases):
        value, entropy, d_hidden, d_weight = full_logits(*case(trained, vocabulary), vocabulary)
        for answer in answers:
            assert error(answer[i][0], value) <= 1e-6
            if with_entropy:
                assert error(answer[i][1], entropy) <= 1e-6
        found = torch.cat([a[i][2] for a in answers]) if sequence_parallel else answers[0][i][2]
        assert error(found, d_hidden) <= 1e-6
        weight_gradient = torch.cat([a[i][3] for a in answers])
        assert error(weight_gradient, d_weight) <= 1e-6
        assert not weight_gradient[vocabulary:].any(), "padded columns have a gradient"


def run_bfloat16(platform):
    group = platform.parallel(tensor=platform.world_size).tp
    return [
        operator(group, case("ragged", 300, torch.bfloat16), 300, chunk_size=c, sequence_parallel=s, main_grad=True)
        for c, s in itertools.product((3, None), (False, True))
    ]


@pytest.mark.parallel
@pytest.mark.numerics
def test_bfloat16_error_is_that_of_rounding_logits_and_their_gradient() -> None:
    """Against float64 from the same bfloat16 inputs: logits, their gradient and d hidden have 8 bits of mantissa."""
    value, _, d_hidden, d_weight = full_logits(*case("ragged", 300, torch.bfloat16), 300)
    answers = run_distributed(run_bfloat16, 2)
    for i, (_, sequence_parallel) in enumerate(itertools.product((3, None), (False, True))):
        found = torch.cat([a[i][2] for a in answers]) if sequence_parallel else answers[0][i][2]
        weight_gradient = torch.cat([a[i][3] for a in answers])
        assert found.dtype == torch.bfloat16 and weight_gradient.dtype == torch.float32
        assert error(answers[0][i][0], value) <= 2**-8
        assert error(found, d_hidden) <= 2**-7
        assert error(weight_gradient, d_weight) <= 2**-7


def run_repeatedly(platform):
    group = platform.parallel(tensor=platform.world_size).tp
    inputs = case("ragged", 300)
    return [operator(group, inputs, 300, chunk_size=c) for c in (None, None, T, 7, 5, 2)]


@pytest.mark.parallel
@pytest.mark.numerics
def test_repeated_calls_are_bitwise_equal_and_chunking_affects_only_rounding() -> None:
    first, again, *others = run_distributed(run_repeatedly, 1)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    for other in others:  # a matmul with fewer rows may use another kernel, which rounds differently
        for found, expected in zip(other, first, strict=True):
            if found is not None:
                assert error(found, expected.double()) <= 1e-6


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast")


def run_counting(platform):
    """Count the collectives of forward and of backward, without and with sequence parallelism."""
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    group = platform.parallel(tensor=platform.world_size).tp
    out = []
    for sequence_parallel in (False, True):
        calls: Counter[str] = Counter()

        def counted(name: str, calls=calls):
            original = getattr(dist, name)

            def call(*args, **kwargs):
                calls[name] += 1
                return original(*args, **kwargs)

            return patch.object(dist, name, call)

        patches = [counted(name) for name in COLLECTIVES]
        for p in patches:
            p.start()
        hidden, weight, targets, grad = case("ragged", 300)
        hidden = hidden.chunk(2)[group.rank()].clone() if sequence_parallel else hidden
        weight = weight.chunk(2)[group.rank()].clone()
        logprobs = vocab_parallel_logprob(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            group=group,
            vocab_size=300,
            chunk_size=3,
            sequence_parallel=sequence_parallel,
        )
        forward = dict(calls)
        calls.clear()
        (logprobs * grad).sum().backward()
        out.append((forward, dict(calls)))
        for p in patches:
            p.stop()
    return out


@pytest.mark.parallel
def test_one_collective_for_statistics_and_one_for_the_gradient() -> None:
    plain, sequence_parallel = run_distributed(run_counting, 2)[0]
    assert plain == ({"all_gather": 1}, {"all_reduce": 1})
    assert sequence_parallel == ({"all_gather_into_tensor": 1, "all_gather": 1}, {"reduce_scatter_tensor": 1})


def test_the_padding_of_the_logits_buffer_is_zero() -> None:
    """bfloat16 matmuls of some CPUs read it. In deterministic mode torch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        buffer = logits_buffer(torch.zeros(1, dtype=torch.bfloat16), 3, 108)
    finally:
        torch.use_deterministic_algorithms(False)
    padded = buffer.as_strided((3, buffer.stride(0)), buffer.stride())
    assert buffer.stride(0) > 108 and buffer.isnan().all()
    assert (padded[:, 108:] == 0).all()
