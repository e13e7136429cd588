"""The training run, from a config to its last checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_iwsft.checkpoint import info as checkpoint
from megatron_iwsft.checkpoint.checkpointer import Saver
from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.writer import CheckpointWriter, Saved
from megatron_iwsft.config.schema import Config
from megatron_iwsft.convert.parity import export_running
from megatron_iwsft.data.corpus import TOKENIZER
from megatron_iwsft.distributed.stop_signals import StopSignals
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import DataError, DivergenceError, RequeueError
from megatron_iwsft.hf.directory import DTYPES
from megatron_iwsft.model.flops import training_flops
from megatron_iwsft.objectives.breakdown import Groups, group
from megatron_iwsft.objectives.custom import needs_reference
from megatron_iwsft.objectives.functions import Settings, sft
from megatron_iwsft.objectives.metrics import summarize
from megatron_iwsft.reference.lagged_copy import LaggedCopy
from megatron_iwsft.reference.sidecar import Sidecar
from megatron_iwsft.train.callbacks import Events, Every, StepInfo, start_hooks
from megatron_iwsft.train.continuation import changes, lock_run, resume
from megatron_iwsft.train.divergence import Guard, Verdict
from megatron_iwsft.train.optim import build_optimizer, build_schedule, gradient_norm, wrap_for_gradients
from megatron_iwsft.train.setup import Job, make_sampler, start_job
from megatron_iwsft.train.step import LossTotals, TrainStep

# How far the policy's log-probs may lie from its own as reference, mean |log-ratio| per token, before the first update. The
# cached reference may have been computed at another layout, which moves the last bits.
START_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 1e-1}

# Metrics that say something only where there is a reference, or weights.
_REFERENCE_METRICS = frozenset(
    "log_ratio abs_log_ratio kl_to_reference bound_sft bound_iw bound_gap not_finite_tokens".split()
)
_WEIGHT_METRICS = frozenset("weight_mean weight_max weight_ess weight_histogram clip_fraction".split())


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) the training that `config` describes; returns the last step's metrics. Collective over all ranks.

    Raises RequeueError when told to stop (SIGUSR1, SIGTERM) before the end: what was done is saved.
    """
    with StopSignals() as stop:
        job = start_job(config)
        with job.watchdog() as watch:
            try:
                with ExitStack() as at_exit:
                    return Trainer(job, watch, stop, at_exit).run()
            except RequeueError:
                dist.barrier()  # torchrun ends the others with the first that leaves, and one may still be closing its logs
                raise


class Trainer:
    """A run under way. Every method is collective over all ranks."""

    def __init__(self, job: Job, watch: Watchdog, stop: StopSignals, at_exit: ExitStack) -> None:
        config = job.config
        self.job, self.watch, self.stop = job, watch, stop
        if job.is_main:
            lock_run(job.run_directory, at_exit)
        self.events = Events(job.run_directory / "logs" / "events.jsonl" if job.is_main else None)
        self.needs_reference = needs_reference(job.objective)
        cached = self.needs_reference and config.reference.source == "cached"
        sidecar = _verified_sidecar(job) if cached else None

        watch.at(0, "building the model")
        self.policy = job.build(job.policy)
        live = job.build(job.reference) if self.needs_reference and not cached else None
        proposal = job.build(job.policy) if config.objective.proposal.kind != "current" else None
        self.lagged = _lagged(job, live, proposal)
        self.chunks = wrap_for_gradients(self.policy, config.optimizer)
        self.optimizer = build_optimizer(self.chunks, config.optimizer, job.dtype)
        self.total_steps = job.sampler.total_steps(config.data.epochs, config.data.max_steps)
        self.schedule = build_schedule(self.optimizer, config.optimizer, self.total_steps)
        settings = Settings(
            level=config.objective.level,
            temperature=config.objective.temperature,
            clip=config.objective.clip_range,
            normalize=config.objective.normalize,
        )
        self.step = TrainStep(
            self.chunks,
            job.parallel,
            job.platform.device,
            job.objective,
            settings,
            reference=live,
            proposal=proposal,
            offload=config.reference.offload,
            router_balance=config.objective.router_balance,
            groups=_groups(job),
        )
        self.batches = job.batches(job.corpus, job.sampler, sidecar)
        self.evaluate = _evaluation(job, self.chunks)

        self.guard = Guard(config.run.spike)
        self.saver = Saver(_writer(job, self._saved), config.checkpoint, self._write, self._save_failed)
        self.done = self._load_newest() or 0
        self.export = Every(config.export.every, self._export, at_end=config.export.at_end)
        self.hooks = start_hooks(job, self.done, self.total_steps, at_exit) if job.is_main else []

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last step's metrics."""
        if self.job.platform.any(self.stop.requested):
            self.events("stopped", f"stopped before step {self.done + 1}; {self.saver.standing()}", step=self.done)
            raise RequeueError
        metrics: dict[str, Any] = {}
        while self.done < self.total_steps:
            stepped = self.train_step(self.done + 1)
            if stepped is None:  # a rewind
                continue
            metrics, stop = stepped
            self.done += 1
            for hook in self.hooks:
                hook(StepInfo(self.done, self.total_steps, metrics))
            if stop and self.done < self.total_steps:
                self._stop()
            self.watch.at(self.done, "exporting")
            self.export(StepInfo(self.done, self.total_steps, metrics))
            self.watch.at(self.done, "saving")
            self.saver.after(self.done)
        self.watch.at(self.done, "saving at the end")
        self.saver.at_end(self.done)
        self.events(
            "finished",
            f"finished: {self.total_steps} steps; {self.job.run_directory}/metrics.jsonl, "
            f"{self.saver.writer.root / checkpoint.step_name(self.total_steps)}",
        )
        return metrics

    def train_step(self, number: int) -> tuple[dict[str, Any], bool] | None:
        """Step `number`, counted from 1: its metrics, and whether a rank was told to stop; None if it led to a rewind."""
        job, started = self.job, time.perf_counter()
        packs = job.sampler.packs_at(number - 1)
        metrics: dict[str, Any] = {"step": number, "epoch": job.sampler.locate(number - 1)[0]}
        if number in self.guard.passed_over:
            stop = job.platform.any(self.stop.requested)
            self._follow(number)
            return metrics | {"loss": None, "nll": None, "grad_norm": None, "skipped": "loss spike"}, stop
        self.watch.at(number, "reading the batch")
        self.optimizer.zero_grad()  # without the distributed optimizer, .grad is main_grad until told otherwise
        batches = self.batches.from_packs(packs)
        self.watch.at(number, "forward and backward")
        metrics |= self.step.forward_backward(batches)
        if number == 1 and self.needs_reference:
            self._check_start(metrics)
        metrics["grad_norm"] = gradient_norm(self.optimizer)
        verdict = self.guard.judge(metrics["loss"], metrics["grad_norm"], metrics["trained_tokens"])
        self.watch.at(number, "update")
        told_to_stop, worst = job.platform.largest(self.stop.requested, verdict)
        if worst == Verdict.SPIKE and self._handle_spike(number, metrics, packs):
            return None
        metrics["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        if worst == Verdict.NOT_FINITE:
            self._skip(number, metrics, packs)
        else:
            self.optimizer.step()
            self.schedule.step(increment=1)
            self.guard.updated(metrics["loss"])
        self._follow(number)
        job.platform.synchronize()
        metrics["step_time_s"] = time.perf_counter() - started
        metrics["tokens"] = sum(int(job.corpus.lengths[ids].sum()) for ids in packs)
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["step_time_s"]
        metrics["tflops_per_gpu"] = self._flops(packs, metrics) / metrics["step_time_s"] / 1e12
        metrics["peak_memory_bytes"] = job.platform.peak_memory()
        metrics["skipped_steps"] = self.guard.skipped
        silent = frozenset() if self.needs_reference else _REFERENCE_METRICS
        silent |= _WEIGHT_METRICS if job.objective is sft else frozenset()
        metrics = {k: v for k, v in metrics.items() if k not in silent}
        if self.evaluate and number % job.config.evaluation.every == 0:
            self.watch.at(number, "evaluation")
            metrics |= self.evaluate()
        return metrics, bool(told_to_stop)

    def _follow(self, number: int) -> None:
        if any(copy.due(number) for copy in self.lagged):
            self._sync_parameters()
        for copy in self.lagged:
            copy.after_step(number, self.policy)

    def _skip(self, number: int, metrics: dict[str, Any], packs: list[Any]) -> None:
        """Leave parameters, optimizer and schedule as they are. Raises DivergenceError after too many in a row."""
        self.guard.skip()
        metrics["skipped"] = "not finite"
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        self.events(
            "skipped",
            f"step {number} is skipped: {what}. Its trajectories are in logs/events.jsonl.",
            step=number,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            trajectories=self._trajectories(packs),
        )
        if self.guard.in_a_row >= self.job.config.run.max_bad_steps:
            self.saver.writer.wait()
            raise DivergenceError(
                f"{self.guard.in_a_row} steps in a row (run.max_bad_steps) had a loss or gradient that is not finite, the last one "
                f"step {number} ({what}). {self.saver.standing().capitalize()} The trajectories are in "
                f"{self.job.run_directory}/logs/events.jsonl."
            )

    def _handle_spike(self, number: int, metrics: dict[str, Any], packs: list[Any]) -> bool:
        """Log a loss spike; rewind if the config asks for it, in which case the answer is True and this step is not taken."""
        settings = self.job.config.run.spike
        mean = sum(self.guard.losses) / len(self.guard.losses)
        self.events(
            "spike",
            f"step {number}: the loss is {metrics['loss']:.4g}, after {mean:.4g} on average.",
            step=number,
            loss=metrics["loss"],
            mean=mean,
            trajectories=self._trajectories(packs),
        )
        if not settings.rewind:
            return False
        if self.guard.rewinds >= settings.max_rewinds:
            raise DivergenceError(
                f"the loss spiked again at step {number}, after {self.guard.rewinds} rewinds (run.spike.max_rewinds). "
                f"{self.saver.standing().capitalize()}"
            )
        self.saver.writer.wait()
        first = max(1, number - settings.batches + 1)
        rewinds, passed_over = self.guard.rewinds + 1, {*self.guard.passed_over, *range(first, number + 1)}
        back = self._load_newest(before=first - 1)
        if back is None:
            self.events("no rewind", f"no checkpoint is older than step {first}: training goes on.", step=number)
            return False
        self.guard.rewinds, self.guard.passed_over = rewinds, sorted(passed_over)
        self.saver.writer.discard_after(back)
        self.events(
            "rewind",
            f"back to step {back}; the batches of steps {first} to {number} are passed over.",
            step=back,
            passed_over=self.guard.passed_over,
        )
        self.done = back
        return True

    def _flops(self, packs: list[Any], metrics: dict[str, Any]) -> float:
        """The policy's share of each rank; what a reference or proposal computes does not count."""
        lengths = self.job.corpus.lengths[np.concatenate(packs)]
        whole = training_flops(self.job.policy.architecture, lengths, metrics["trained_tokens"])
        return whole / self.job.platform.world_size

    def _trajectories(self, packs: list[Any]) -> list[str]:
        ids = self.job.corpus.meta(["id"])["id"]
        return [str(ids[int(i)]) for pack in packs for i in pack]

    def _stop(self) -> None:
        """Save what is done and leave."""
        self.watch.at(self.done, "saving before leaving")
        saved = self.saver.now(self.done)
        text = f"stopped after step {self.done} of {self.total_steps}; " + (
            "start the run again to continue." if saved else f"it could not be saved, but {self.saver.standing()}"
        )
        self.events("stopped", text, step=self.done)
        raise RequeueError

    def _load_newest(self, *, before: int | None = None) -> int | None:
        """Load the newest whole checkpoint of this run; returns its step, or None if there is none."""
        job, root = self.job, self.saver.writer.root
        self.watch.at(self.done if before else 0, "loading a checkpoint")
        if before is not None:
            self._sync_parameters()

        def load(info: CheckpointInfo) -> None:
            checkpoint.load(
                info.directory,
                self.policy,
                optimizer=self.optimizer,
                schedule=self.schedule,
                random=info.layout == self.saver.writer.layout,
                lagged=self.lagged,
            )

        info = resume(job, load, lambda text: self.events("damaged checkpoint", text), before=before)
        if info is None:
            return None
        self.guard.load_state(info.trainer["guard"])
        self.saver.last_good = Saved(root / info.directory.name, info.step, info.size, 0.0, 0.0)
        changed = changes(self.job.config, info.config)
        self.events(
            "resumed",
            f"resuming from {info.directory} after step {info.step}" + (f" with {changed}" if changed else ""),
            step=info.step,
        )
        return info.step

    def _write(self, writer: CheckpointWriter, step: int) -> None:
        self._sync_parameters()
        writer.save(
            step,
            self.policy,
            optimizer=self.optimizer,
            schedule=self.schedule,
            trainer={"guard": self.guard.state(), "objective": self.job.objective_source},
            lagged=self.lagged,
        )

    def _export(self, info: StepInfo) -> None:
        self._sync_parameters()
        config, writer = self.job.config, self.saver.writer
        output = self.job.run_directory / "hf" / checkpoint.step_name(info.step)
        dtype = DTYPES[config.export.dtype or config.precision.dtype]
        export_running(self.policy, self.job.parallel, output, writer.supporting_files(info.step), dtype=dtype)

    def _sync_parameters(self) -> None:
        if (
            self.job.config.optimizer.overlap_param_gather
        ):  # else parameters are gathered no sooner than the next forward
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _saved(self, saved: Saved) -> None:
        self.events(
            "saved",
            f"saved {saved.directory.name}: {saved.bytes / 1e9:.2f} GB, training stood still for {saved.stall_s:.2f} s, "
            f"whole after {saved.total_s:.2f} s",
            step=saved.step,
            bytes=saved.bytes,
            stall_s=saved.stall_s,
            total_s=saved.total_s,
        )

    def _save_failed(self, step: int, why: str) -> None:
        settings = self.job.config.checkpoint
        self.events(
            "save failed",
            f"saving after step {step} failed: {why} Training goes on and tries again after {settings.retry_after} steps; "
            f"{self.saver.standing()}",
            step=step,
        )

    def _check_start(self, metrics: dict[str, Any]) -> None:
        """Before the first update, a reference that is the initial policy must give the policy's own log-probs."""
        if self.job.reference.fingerprint != self.job.policy.fingerprint:
            return
        precision = self.job.config.precision
        found, allowed = metrics["abs_log_ratio"], START_TOLERANCE["fp8" if precision.fp8 else precision.dtype]
        if not found <= allowed:  # NaN too
            raise DataError(
                f"policy and reference are the same model, yet their log-probs differ by {found:.3g} per token on the first batch "
                f"(allowed in {precision.described}: {allowed:g}). Model, tokenizer and template match by fingerprint, so the "
                "cached log-probs are damaged or were computed by other code: remove the corpus's reference-* directory and run "
                "tools/precompute_reference.py again, or use reference.source: live."
            )


def _verified_sidecar(job: Job) -> Sidecar:
    """Every rank reads some of its files, once. Collective; raises DataError on all ranks."""
    sidecar = Sidecar(job.corpus, job.identity)
    complaints: list[Any] = [None] * job.platform.world_size
    dist.all_gather_object(complaints, sidecar.damage(job.platform.rank, job.platform.world_size))
    for complaint in (text for rank in complaints for text in rank):
        raise DataError(complaint)
    return sidecar


def _writer(job: Job, on_saved: Any) -> CheckpointWriter:
    config, template = job.config, job.corpus.manifest["template"]
    named = template and job.corpus.manifest["settings"]["template"] != "tokenizer"
    return CheckpointWriter(
        job.run_directory / "checkpoints",
        architecture=job.policy.architecture,
        config=config.model_dump(),
        layout={**config.parallel.model_dump(), "data": job.data_size},
        tokenizer_files=job.policy.tokenizer_files or sorted((job.corpus.directory / TOKENIZER).iterdir()),
        template_hash=template["hash"] if template else None,
        chat_template=template["source"] if named else None,
        corpus=job.corpus.fingerprint,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
        on_saved=on_saved,
    )


def _lagged(job: Job, live: list[Any] | None, proposal: list[Any] | None) -> list[LaggedCopy]:
    """The frozen models that follow the policy, and when."""
    out, settings, refresh = [], job.config.objective.proposal, job.config.reference.refresh
    if proposal is not None:
        every = settings.update_every
        assert every is not None
        out.append(LaggedCopy("proposal", proposal, lambda step: step % every == 0, settings.decay or 0.0))
    if refresh and live is not None:

        def due(step: int) -> bool:
            return job.sampler.locate(step)[1] == 0 if refresh == "epoch" else step % refresh == 0

        out.append(LaggedCopy("reference", live, due))
    return out


def _groups(job: Job) -> Groups | None:
    found = group(job.corpus.scores, job.corpus.meta(["source"])["source"].to_pylist())
    return None if found is None else Groups(found.names, found.of.to(job.platform.device))


def _evaluation(job: Job, chunks: list[Any]) -> Any:
    """A function giving the loss on `evaluation.corpus`, or None."""
    corpus = job.evaluation
    if corpus is None:
        return None
    unweighted = job.config.model_copy(
        update={"data": job.config.data.model_copy(update={"quality": type(job.config.data.quality)()})}
    )
    sampler = make_sampler(unweighted, corpus)
    builder = job.batches(corpus, sampler)
    step = TrainStep(chunks, job.parallel, job.platform.device, sft, Settings())

    def evaluate() -> dict[str, float]:
        totals = LossTotals(job.platform.device)
        for index in range(sampler.epoch(0).num_steps):
            totals.sums += step.evaluate(builder.at_step(index)).sums
        return {"eval_nll": summarize(totals.sums, totals.weight_max)["nll"]}

    return evaluate
