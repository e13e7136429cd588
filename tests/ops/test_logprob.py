"""The operator against full logits in float64: value and both gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_iwsft.batch import IGNORE
from megatron_iwsft.testing import run_distributed

H, VOCAB, PADDED, T = 24, 300, 384, 16


def case(trained: str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator)
    weight = torch.randn(PADDED, H, generator=generator)
    targets = torch.randint(0, VOCAB, (T,), generator=generator)
    keep = {
        "all": torch.ones(T),
        "none": torch.zeros(T),
        "one": torch.eye(T)[3],
        "ragged": torch.rand(T, generator=generator),
    }[trained]
    targets[keep < 0.5] = IGNORE
    grad = torch.randn(T, generator=generator)
    return hidden, weight, targets, grad


def full_logits(hidden, weight, targets, grad):
    """(log-probs, d hidden, d weight) in float64 over the real vocabulary."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    trained = targets != IGNORE
    logprobs = torch.log_softmax(hidden @ weight[:VOCAB].T, dim=-1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * trained
    (picked * grad.double()).sum().backward()
    return picked.detach(), hidden.grad, weight.grad


def run_operator(platform, cases):
    """Each case through the operator, sharded over the job; whole results."""
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    group = platform.parallel(tensor=platform.world_size).tp
    rank, size = group.rank(), group.size()
    out = []
    for trained, sequence_parallel, chunk_size, main_grad in cases:
        hidden, weight, targets, grad = case(trained)
        if sequence_parallel:
            hidden = hidden.chunk(size)[rank].clone()
        weight = weight.chunk(size)[rank].clone()
        hidden.requires_grad_()
        weight.requires_grad_()
        if main_grad:
            weight.main_grad = torch.ones(weight.shape)
        logprobs = vocab_parallel_logprob(
            hidden,
            weight,
            targets,
            group=group,
            vocab_size=VOCAB,
            chunk_size=chunk_size,
            sequence_parallel=sequence_parallel,
        )
        (logprobs * grad).sum().backward()
        if main_grad:
            assert weight.grad_added_to_main_grad and not weight.grad.any()
        out.append((logprobs.detach(), hidden.grad, weight.main_grad - 1 if main_grad else weight.grad))
    return out


def close(found, expected, tolerance=1e-5):
    scale = expected.norm().clamp(min=1e-3)
    assert (found.double() - expected).norm() / scale <= tolerance


@pytest.mark.parallel
@pytest.mark.parametrize("world_size", [1, 2])
def test_value_and_gradients(world_size: int) -> None:
    cases = [
        (trained, sequence_parallel, chunk_size, main_grad)
        for trained in ("all", "none", "one", "ragged")
        for sequence_parallel in (False, True)
        for chunk_size in (1, 5, None)
        for main_grad in (False, True)
    ]
    answers = run_distributed(run_operator, world_size, cases)
    for i, (trained, sequence_parallel, _, _) in enumerate(cases):
        value, d_hidden, d_weight = full_logits(*case(trained))
        for answer in answers:
            close(answer[i][0], value)
        found = torch.cat([a[i][1] for a in answers]) if sequence_parallel else answers[0][i][1]
        close(found, d_hidden)
        close(torch.cat([a[i][2] for a in answers]), d_weight)
        assert not torch.cat([a[i][2] for a in answers])[VOCAB:].any(), "padded columns have a gradient"


def test_bfloat16_inputs_keep_float32_softmax() -> None:
    answers = run_distributed(run_bfloat16, 1)
    value, expected = answers[0]
    # Only the logits are rounded to bfloat16 (8 bits); the log-sum-exp over them is not.
    assert (value - expected).abs().max() < 1e-4


def run_bfloat16(platform):
    from megatron_iwsft.ops.logprob import vocab_parallel_logprob

    hidden, weight, targets, _ = case("all")
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    group = platform.parallel().tp
    found = vocab_parallel_logprob(hidden, weight, targets, group=group, vocab_size=VOCAB)
    logits = (hidden @ weight.T)[:, :VOCAB].double()
    return found.double(), torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
