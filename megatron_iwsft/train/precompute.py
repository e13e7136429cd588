"""One forward pass of the reference over the corpora → a sidecar of reference log-probs in each."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist

from megatron_iwsft.config.schema import Config
from megatron_iwsft.distributed.agreement import own_share
from megatron_iwsft.distributed.stop_signals import StopSignals
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import RequeueError
from megatron_iwsft.model.gpt import forward
from megatron_iwsft.reference.mixture import MixtureSidecarWriter
from megatron_iwsft.train.check import check, check_cacheable
from megatron_iwsft.train.setup import StartedRun, reference_identities, start
from megatron_iwsft.train.step import run_schedule
from megatron_iwsft.utils.progress import progress
from megatron_iwsft.utils.text import tell


def precompute_reference(config: Config) -> list[str]:
    """Write the sidecars that `reference.source: cached` reads; returns their directories. Collective over all ranks.

    Uses the config's own layout, packing and batch sizes, so that reference and policy log-probs go through the same arithmetic. An
    interrupted run continues: finished global batches are skipped. Complete sidecars are left unchanged. Global batches are those of
    training's first epoch as far as they hold something new, then what that epoch leaves out: so the log-probs of the first epoch are
    computed in the same rows as the policy's.

    Raises RequeueError when asked to stop (Ctrl-C, SIGUSR1, SIGTERM) before the end.
    """
    check_cacheable(config)
    with StopSignals() as stop:
        run = start(check(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        writer = MixtureSidecarWriter(run.mixture, reference_identities(run))
        writer.skip_complete(run.platform)
        with run.watchdog() as watch, writer.lock() if run.is_main else nullcontext():
            return _precompute(run, writer, watch, stop)


def _precompute(run: StartedRun, writer: MixtureSidecarWriter, watch: Watchdog, stop: StopSignals) -> list[str]:
    if writer.skip_complete(run.platform):
        if run.is_main:
            for directory in writer.directories:
                tell(f"{directory} is already complete.")
        return writer.directories
    if run.is_main:
        writer.prepare()
        tell(
            f"reference log-probs of {len(run.mixture):,} trajectories by {run.reference.described}; "
            f"{run.platform.device.type}, {run.layout.describe()}"
        )
    dist.barrier()
    writer.open()

    watch.at(0, "building the reference")
    chunks = run.build(run.reference)
    for chunk in chunks:
        chunk.eval()
    builder = run.batches(run.mixture, run.sampler)
    # One rank of each tensor-parallel group writes; context-parallel ranks hold different positions.
    writes = run.parallel.tp.rank() == 0

    def forward_step(batches, model):
        batch = next(batches)

        def keep(logprobs: torch.Tensor):
            if writes:
                writer.write(batch, logprobs[0])
            return logprobs.sum(), torch.ones((), dtype=torch.int), {}

        return forward(model, batch.to(run.platform.device)), keep

    plan = run.sampler.covering()
    steps = range(plan.num_steps)
    for index in progress(steps, "reference log-probs", unit="batches", shown=run.is_main):
        packs, number = plan.step(index), index + 1
        watch.at(number, "forward")
        unfinished = not all(writer.done(i) for pack in own_share(packs) for i in pack.tolist())
        # Ranks see shared files and signals at slightly different times; they must agree.
        needed, told_to_stop = run.platform.largest(unfinished, stop.requested)
        if told_to_stop:
            writer.flush()
            if run.is_main:
                tell(f"stopped after batch {number - 1} of {plan.num_steps}; start it again to continue.")
            dist.barrier()
            raise RequeueError
        if not needed:
            continue
        batches = builder.from_packs(packs)
        with torch.no_grad():
            run_schedule(chunks, batches, forward_step, run.parallel, forward_only=True)
    writer.flush()
    dist.barrier()
    if run.is_main:
        for directory, count in writer.finish({"model": run.reference.described, "layout": run.layout.describe()}):
            tell(f"{directory}: log-probs of {count:,} trajectories by {run.reference.described}")
    dist.barrier()
    return writer.directories
