"""The loss on held-out trajectories, every few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from megatron_iwsft.objectives.functions import Settings, sft
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.check import evaluation_sampler
from megatron_iwsft.train.setup import StartedRun
from megatron_iwsft.train.step import TrainStep


def evaluation(run: StartedRun, chunks: list[DistributedDataParallel]) -> Callable[[StepResult], dict[str, Any]]:
    """A collective callback that returns `eval_nll`, the mean over the trained tokens of `evaluation.corpus`."""
    assert run.evaluation is not None
    sampler = evaluation_sampler(run.config, run.evaluation)
    builder = run.batches(run.evaluation, sampler)
    step = TrainStep(chunks, run.parallel, run.platform.device, sft, Settings())

    def evaluate(result: StepResult) -> dict[str, Any]:
        if result.metrics["loss"] is None:  # passed over: the policy has not changed
            return {}
        nll = tokens = 0.0
        for index in range(sampler.epoch(0).num_steps):
            totals = step.evaluate(builder.at_step(index))
            nll, tokens = nll + totals["nll"], tokens + totals["tokens"]
        return {"eval_nll": nll / tokens}

    return evaluate
