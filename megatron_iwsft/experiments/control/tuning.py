"""Training a Gaussian policy on curated episodes, by the objective functions of the language models."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iwsft.errors import DivergenceError
from megatron_iwsft.experiments.control.config import Objective, Training
from megatron_iwsft.experiments.control.policy import AveragedPolicy, GaussianPolicy
from megatron_iwsft.experiments.control.replay import Replay
from megatron_iwsft.objectives.functions import OBJECTIVES, Trajectories, local_segment_sum
from megatron_iwsft.objectives.loss import micro_batch_loss, sum_names


@dataclass(frozen=True)
class Tuned:
    """What training ended with. The last three are of the weights of the last tenth of the steps.

    nll: nats a step of an episode, over the same steps; ess: effective sample size as a share; clipped: the share of weights that
    the clip changed; weight: their mean.
    """

    policy: GaussianPolicy
    nll: float
    ess: float
    clipped: float
    weight: float


@torch.no_grad()
def log_probs(policy: GaussianPolicy, replay: Replay) -> Tensor:
    """float32 [T] of every step in the replay: a reference's sidecar."""
    chunks = zip(replay.observations.split(16384), replay.actions.split(16384), strict=True)
    return torch.cat([policy.log_prob(observations, actions) for observations, actions in chunks])


def learning_rate(settings: Training, step: int) -> float:
    """Of the update after `step` others: linear warm-up, then half a cosine to 0."""
    warmup = round(settings.steps * settings.warmup_fraction)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def batch_of(
    policy: GaussianPolicy, replay: Replay, episodes: Tensor, proposal: GaussianPolicy | None, reference: Tensor | None
) -> Trajectories:
    """The objective's view of a batch of episodes. Without a proposal, q is the policy; without a reference, r is q."""
    steps, segment = replay.steps(episodes)
    observations, actions = replay.observations[steps], replay.actions[steps]
    logprobs = policy.log_prob(observations, actions)
    with torch.no_grad():
        q = logprobs.detach() if proposal is None else proposal.log_prob(observations, actions)
    return Trajectories(
        logprobs=logprobs,
        proposal=q,
        reference=q if reference is None else reference[steps],
        mask=torch.ones_like(q),
        segment=segment,
        lengths=replay.lengths[episodes].float(),
        quality=torch.ones(len(episodes)),
        segment_sum=local_segment_sum(segment, len(episodes)),
    )


def tune(
    start: GaussianPolicy,
    replay: Replay,
    curated: Tensor,
    objective: Objective,
    settings: Training,
    *,
    reference: Tensor | None = None,
    generator: torch.Generator,
) -> Tuned:
    """Train a copy of `start` on the episodes `curated` (int64, with repetitions), drawn uniformly.

    reference: float32 [T] of `log_probs`; None is for `sft`. Raises DivergenceError where the loss is not a finite number.
    """
    policy = copy.deepcopy(start)
    ema = objective.proposal
    average = (
        AveragedPolicy(policy, decay=ema.decay or 0.0, update_every=ema.update_every)
        if objective.name == "iw_sft" and ema.update_every
        else None
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.lr)
    function = OBJECTIVES[objective.name]
    names = sum_names(function)
    totals = torch.zeros(len(names), dtype=torch.float64)
    for step in range(settings.steps):
        episodes = curated[torch.randint(len(curated), (settings.batch_size,), generator=generator)]
        batch = batch_of(policy, replay, episodes, average.average if average else None, reference)
        out = micro_batch_loss(function, batch, objective.settings)
        denominator = float(out.sums[names.index("denominator")])
        if not math.isfinite(denominator) or denominator <= 0 or not bool(torch.isfinite(out.loss)):
            raise DivergenceError(
                f"the loss of update {step + 1} is {float(out.loss)} over {denominator}; lower the learning rate."
            )
        optimizer.zero_grad(set_to_none=True)
        (out.loss / denominator).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        if average:
            average.after_step(step + 1, policy)
        if step >= settings.steps - max(1, settings.steps // 10):
            totals += out.sums
    last = dict(zip(names, totals.tolist(), strict=True))
    return Tuned(
        policy=policy,
        nll=last["nll"] / last["tokens"],
        ess=last["weight"] ** 2 / (last["units"] * last["weight_squared"]),
        clipped=last["clipped"] / last["units"],
        weight=last["weight"] / last["units"],
    )
