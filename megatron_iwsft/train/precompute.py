"""One forward pass of the reference over the corpus → the sidecar of reference log-probs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_iwsft.config.schema import Config
from megatron_iwsft.distributed.stop_signals import StopSignals
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import RequeueError
from megatron_iwsft.model.gpt import forward
from megatron_iwsft.reference.sidecar import SidecarWriter
from megatron_iwsft.train.setup import Job, all_packs, start_job
from megatron_iwsft.train.step import run_schedule


def precompute_reference(config: Config) -> str:
    """Write the sidecar that `reference.source: cached` reads; returns its directory. Collective over all ranks.

    Uses the config's own layout, packing and batch sizes, so that r_t goes through the arithmetic that the policy's log-probs
    will. An interrupted run continues: finished global batches are skipped. A complete sidecar is left as it is.

    Raises RequeueError when told to stop (SIGUSR1, SIGTERM) before the end.
    """
    with StopSignals() as stop:
        job = start_job(config)
        with job.watchdog() as watch:
            return _precompute(job, watch, stop)


def _precompute(job: Job, watch: Watchdog, stop: StopSignals) -> str:
    writer = SidecarWriter(job.corpus, job.identity)
    if writer.complete:
        if job.is_main:
            print(f"{writer.directory} is complete already.", flush=True)
        return str(writer.directory)
    if job.is_main:
        writer.prepare()
    dist.barrier()
    writer.open()

    watch.at(0, "building the reference")
    chunks = job.build(job.reference)
    for chunk in chunks:
        chunk.eval()
    builder = job.batches(job.corpus, job.sampler)
    # One rank of each tensor-parallel group writes; every context-parallel rank has positions of its own.
    writes = job.parallel.tp.rank() == 0

    def forward_step(batches, model):
        batch = next(batches)

        def keep(nll: torch.Tensor):
            if writes:
                writer.write(batch, -nll[0])
            return nll.sum(), torch.ones((), dtype=torch.int), {}

        return forward(model, batch.to(job.platform.device)), keep

    steps = list(all_packs(job))
    shown = tqdm(steps, desc="reference log-probs", unit="batch", disable=None if job.is_main else True)
    for number, packs in enumerate(shown, start=1):
        watch.at(number, "forward")
        unfinished = not all(writer.done(i) for pack in packs for i in pack.tolist())
        # Ranks look at shared files, and hear of signals, at slightly different times; they must agree.
        needed, told_to_stop = job.platform.largest(unfinished, stop.requested)
        if told_to_stop:
            writer.flush()
            if job.is_main:
                print(f"stopped after batch {number - 1} of {len(steps)}; start it again to continue.", flush=True)
            dist.barrier()
            raise RequeueError
        if not needed:
            continue
        batches = builder.from_packs(packs)
        with torch.no_grad():
            run_schedule(chunks, batches, forward_step, job.parallel, forward_only=True)
    writer.flush()
    dist.barrier()
    if job.is_main:
        writer.finish({"model": job.reference.described, "layout": job.parallel.describe()})
        print(
            f"{writer.directory}: log-probs of {len(job.corpus):,} trajectories by {job.reference.described}",
            flush=True,
        )
    dist.barrier()
    return str(writer.directory)
