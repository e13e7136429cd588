"""One forward pass of the reference over the corpus → the sidecar of reference log-probs."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_iwsft.config.schema import Config
from megatron_iwsft.distributed.agreement import own_share
from megatron_iwsft.distributed.stop_signals import StopSignals
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import RequeueError
from megatron_iwsft.model.gpt import forward
from megatron_iwsft.reference.sidecar import SidecarWriter
from megatron_iwsft.train.setup import StartedRun, all_packs, check, reference_identity, start
from megatron_iwsft.train.step import run_schedule


def precompute_reference(config: Config) -> str:
    """Write the sidecar that `reference.source: cached` reads; returns its directory. Collective over all ranks.

    Uses the config's own layout, packing and batch sizes, so that reference and policy log-probs go through the same arithmetic. An
    interrupted run continues: finished global batches are skipped. A complete sidecar is left unchanged.

    Raises RequeueError when asked to stop (SIGUSR1, SIGTERM) before the end.
    """
    with StopSignals() as stop:
        run = start(check(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        writer = SidecarWriter(run.corpus, reference_identity(run))
        complete = run.platform.any(writer.complete)
        with run.watchdog() as watch, writer.lock() if run.is_main and not complete else nullcontext():
            return _precompute(run, writer, watch, stop)


def _precompute(run: StartedRun, writer: SidecarWriter, watch: Watchdog, stop: StopSignals) -> str:
    if run.platform.any(writer.complete):
        if run.is_main:
            print(f"{writer.directory} is already complete.", flush=True)
        return str(writer.directory)
    if run.is_main:
        writer.prepare()
    dist.barrier()
    writer.open()

    watch.at(0, "building the reference")
    chunks = run.build(run.reference)
    for chunk in chunks:
        chunk.eval()
    builder = run.batches(run.corpus, run.sampler)
    # One rank of each tensor-parallel group writes; context-parallel ranks hold different positions.
    writes = run.parallel.tp.rank() == 0

    def forward_step(batches, model):
        batch = next(batches)

        def keep(logprobs: torch.Tensor):
            if writes:
                writer.write(batch, logprobs[0])
            return logprobs.sum(), torch.ones((), dtype=torch.int), {}

        return forward(model, batch.to(run.platform.device)), keep

    steps = list(all_packs(run))
    shown = tqdm(steps, desc="reference log-probs", unit="batch", disable=None if run.is_main else True)
    for number, packs in enumerate(shown, start=1):
        watch.at(number, "forward")
        unfinished = not all(writer.done(i) for pack in own_share(packs) for i in pack.tolist())
        # Ranks see shared files and signals at slightly different times; they must agree.
        needed, told_to_stop = run.platform.largest(unfinished, stop.requested)
        if told_to_stop:
            writer.flush()
            if run.is_main:
                print(f"stopped after batch {number - 1} of {len(steps)}; start it again to continue.", flush=True)
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
        writer.finish({"model": run.reference.described, "layout": run.layout.describe()})
        print(
            f"{writer.directory}: log-probs of {len(run.corpus):,} trajectories by {run.reference.described}",
            flush=True,
        )
    dist.barrier()
    return str(writer.directory)
