"""Train a Gaussian policy on curated episodes, with the objective functions of the language models."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iwsft.errors import DivergenceError
from megatron_iwsft.experiments.control.config import ControlObjective, Training
from megatron_iwsft.experiments.control.policy import AveragedPolicy, GaussianPolicy
from megatron_iwsft.experiments.control.replay import Replay
from megatron_iwsft.objectives.functions import OBJECTIVES, Trajectories, local_segment_sum
from megatron_iwsft.objectives.loss import micro_batch_loss, reported_metrics, sum_names
from megatron_iwsft.objectives.metrics import summarize

_WEIGHT_METRICS = {"ess": "weight_ess", "clipped": "clip_fraction", "weight": "weight_mean"}


@dataclass(frozen=True)
class Tuned:
    """The trained policy, and metrics over the last tenth of the updates.

    nll: nats per episode step; ess: effective sample size as a fraction; clipped: fraction of weights that the clip changed;
    weight: mean weight; all three are nan for `sft`.
    """

    policy: GaussianPolicy
    nll: float
    ess: float
    clipped: float
    weight: float


@torch.no_grad()
def log_probs(policy: GaussianPolicy, replay: Replay) -> Tensor:
    """Log-density of every step in the replay, float32 [T]."""
    chunks = zip(replay.observations.split(16384), replay.actions.split(16384), strict=True)
    return torch.cat([policy.log_prob(observations, actions) for observations, actions in chunks])


def learning_rate(settings: Training, step: int) -> float:
    """Learning rate of update `step`, from 0: linear warm-up, then cosine decay to 0."""
    warmup = round(settings.steps * settings.warmup_fraction)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def batch_of(
    policy: GaussianPolicy, replay: Replay, episodes: Tensor, proposal: GaussianPolicy | None, reference: Tensor | None
) -> Trajectories:
    """The objective's inputs for a batch of episodes. Without a proposal q is the policy, without a reference r is q."""
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
    objective: ControlObjective,
    settings: Training,
    *,
    reference: Tensor | None = None,
    generator: torch.Generator,
) -> Tuned:
    """Train a copy of `start` on episodes drawn uniformly from `curated` (int64 indices, may repeat).

    reference: float32 [T] from `log_probs`; None for `sft`. Raises DivergenceError if the loss is not finite.
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
                f"invalid loss at update {step + 1}: {float(out.loss)} / {denominator}. Lower the learning rate."
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
    sums = dict(zip(names, totals.tolist(), strict=True)) | {"weight_max": math.nan}
    metrics = summarize(sums, reported_metrics(function))
    weights = {field: metrics.get(name, math.nan) for field, name in _WEIGHT_METRICS.items()}
    return Tuned(policy=policy, nll=metrics["nll"], **weights)
