"""The training run, from a config to its last checkpoint."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_iwsft.checkpoint.best import BestCheckpoints
from megatron_iwsft.checkpoint.checkpointer import Checkpointer
from megatron_iwsft.checkpoint.info import step_name
from megatron_iwsft.checkpoint.state import HostState, TrainState
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.batch_builder import BatchesAhead
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.distributed.mcore_compat import gather_parameters, prepare_gradients, update_parameters
from megatron_iwsft.distributed.stop_signals import StopSignals
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError, DivergenceError, RequeueError
from megatron_iwsft.model.flops import peak_tflops, training_flops
from megatron_iwsft.train.callbacks import Callback, CallbackFunction, StepResult
from megatron_iwsft.train.callbacks.defaults import add_configured_callbacks
from megatron_iwsft.train.callbacks.events import Events
from megatron_iwsft.train.callbacks.slow_ranks import rank_times
from megatron_iwsft.train.check import check
from megatron_iwsft.train.continuation import (
    DataPosition,
    check_same_run,
    continue_data,
    described_changes,
    described_layout,
)
from megatron_iwsft.train.divergence import DivergenceMonitor, Verdict
from megatron_iwsft.train.early_stop import EarlyStop
from megatron_iwsft.train.frozen_models import (
    check_start,
    lagged_copies,
    live_reference,
    scaled_by_history,
    verified_sidecars,
)
from megatron_iwsft.train.optim import build_optimizer, wrap_for_gradients
from megatron_iwsft.train.phases import PhaseTimes
from megatron_iwsft.train.profiling import StepProfiler, range_of
from megatron_iwsft.train.sampling import loss_groups
from megatron_iwsft.train.schedule import Schedule
from megatron_iwsft.train.setup import StartedRun, checkpoint_writer, start
from megatron_iwsft.train.step import TrainStep
from megatron_iwsft.utils.locks import exclusive
from megatron_iwsft.utils.text import tell

# A killed run's lock is released with the last of its processes.
_LOCK_PATIENCE_S = 15.0


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) the training that `config` describes; returns the last step's metrics. Collective over all ranks.

    Raises CheckpointError after the end if an export failed on the way; RequeueError when asked to stop (Ctrl-C, SIGUSR1, SIGTERM) before
    the end, after saving.
    """
    with StopSignals() as stop:
        run = start(check(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
        with run.watchdog() as watch:
            try:
                with ExitStack() as at_exit:
                    return Trainer(run, watch, stop, at_exit).train()
            except RequeueError:
                dist.barrier()  # torchrun ends all ranks with the first that leaves, and one may still be closing its logs
                raise


class Trainer:
    """A run in progress. Every method is collective over all ranks."""

    def __init__(self, run: StartedRun, watch: Watchdog, stop: StopSignals, at_exit: ExitStack) -> None:
        config = run.config
        self.run, self.watch, self.stop = run, watch, stop
        if run.is_main:
            run.run_directory.mkdir(parents=True, exist_ok=True)
            at_exit.enter_context(exclusive(run.run_directory, ConfigError, patience_s=_LOCK_PATIENCE_S))
        self.events = Events(run.run_directory / "logs" / "events.jsonl" if run.is_main else None)
        cached = run.objective.needs_reference and config.reference.source == "cached"
        reference = verified_sidecars(run) if cached else None

        watch.at(0, "building the model")
        policy = run.build_policy(trained=True)
        live = live_reference(run, policy) if run.objective.needs_reference and not cached else None
        proposal = run.build_policy() if config.objective.proposal.kind != "current" else None
        self.chunks = wrap_for_gradients(policy, run.optimizer, config.megatron.given())
        self.optimizer = build_optimizer(self.chunks, run.optimizer, run.dtype)
        self.total_steps = run.total_steps
        self.schedule = Schedule(self.optimizer, config.optimizer, self.total_steps)
        self.monitor = DivergenceMonitor(config.run.spike)
        self.stop_early = EarlyStop(config.run.stop_early) if config.run.stop_early else None
        best = BestCheckpoints(config.checkpoint.best) if config.checkpoint.best else None
        host: dict[str, HostState | None] = {
            "divergence": self.monitor,
            "data": DataPosition(run.sampler),
            "stop_early": self.stop_early,
            "best": best,
        }
        self.state = TrainState(
            policy,
            self.optimizer,
            self.schedule,
            lagged=lagged_copies(run, live, proposal),
            frozen=scaled_by_history(run, live, proposal),
            host={name: part for name, part in host.items() if part is not None},
            gather_parameters=self._gather_parameters,
        )
        breakdown = loss_groups(run.mixture)
        self.step = TrainStep(
            self.chunks,
            run.parallel,
            run.platform.device,
            run.objective,
            run.settings,
            reference=live,
            proposal=proposal,
            offload=config.reference.offload,
            router_balance=config.objective.router_balance,
            breakdown=breakdown,
        )
        builder = run.batches(run.mixture, run.sampler, reference, breakdown)
        self.batches = BatchesAhead(builder.at_step, pinned=run.platform.is_cuda)
        at_exit.callback(self.batches.close)
        self.peak_tflops = peak_tflops(run.platform.device_name)
        self.profiler = StepProfiler(
            config.run.profile,
            run.platform.rank,
            run.run_directory / "logs" / "profile",
            is_cuda=run.platform.is_cuda,
        )
        at_exit.callback(self.profiler.close)
        self._ended: float | None = None
        self.callbacks: list[Callback] = []
        self.failures: list[str] = []
        writer = checkpoint_writer(run)
        self.checkpointer = Checkpointer(
            writer,
            self.state,
            config.checkpoint,
            accept=lambda info: check_same_run(run, info, writer.adapter),
            report=self.events,
            best=best,
        )
        self._resume()
        ignored = run.policy.architecture.ignored_keys
        if ignored and self.state.step == 0:
            self.events("config keys ignored", ignored)
        add_configured_callbacks(self, writer, at_exit)

    def add_callback(
        self,
        function: CallbackFunction,
        *,
        every: int = 1,
        at_end: bool = False,
        at_start: bool = False,
        collective: bool = False,
        phase: str = "callback",
        saves: bool = False,
    ) -> None:
        """Call `function` with the `StepResult` after every `every`-th step, after the last one with `at_end`, and with `at_start` before
        the first one, with a result of step 0 that has no metrics of training.

        collective: on every rank, else on the main rank only. A dict that a collective function returns is added to the step's metrics:
        these run first, then those on the main rank, which log the metrics, then those that save. Within each of these groups
        callbacks run in the order in which they were added. phase: what the watchdog calls a collective one.
        """
        self.insert_callback(Callback(function, every, at_end, at_start, collective, phase, saves))

    def insert_callback(self, callback: Callback) -> None:
        """Add a callback behind those of its `order`."""
        self.callbacks.append(callback)
        self.callbacks.sort(key=lambda other: other.order)

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the last step's metrics."""
        state = self.state
        if self.run.platform.any(self.stop.requested):
            self.events(
                "stopped",
                f"stopped before step {state.step + 1}. {self.checkpointer.last_checkpoint_text}",
                step=state.step,
            )
            raise RequeueError
        metrics: dict[str, Any] = {}
        if state.step == 0 and any(callback.at_start and callback.order == 0 for callback in self.callbacks):
            self._call_back(self._result({"step": 0, "epoch": 0}, stopping=False))
        self._export_if_missing()
        while state.step < self.total_steps:
            self.profiler.before(state.step + 1)
            result = self.train_step(state.step + 1)
            if result is None:  # rolled back
                continue
            state.step, metrics = result.step, result.metrics
            with range_of("callbacks"):
                result = self._call_back(result)
            profiled = self.profiler.after(result.step)
            if profiled is not None:
                tell(profiled)
            if result.stopping and not result.is_last:
                self._save_and_leave()
        self._finish()
        return metrics

    def save(self, result: StepResult) -> None:
        """After a step: save if this step is due, and in any case after the last one."""
        self.checkpointer.judge(result.metrics)
        if result.is_last:
            self.checkpointer.finish()
        elif not result.stopping:  # saving then follows the other callbacks
            self.checkpointer.after_step()

    def _export_if_missing(self) -> None:
        """Write the export that is due at this step: the run may have been stopped between its checkpoint and its export."""
        result = self._result({"step": self.state.step}, stopping=False)
        self._call([c for c in self.callbacks if c.saves and c.function != self.save and c.due(result)], result)

    def report_failure(self, text: str) -> None:
        """Log what failed although training continues; the run then ends with CheckpointError, after its last step."""
        self.events("failed", f"{text} Training continues.", step=self.state.step)
        self.failures.append(text)

    def _finish(self) -> None:
        step, newest = self.state.step, self.checkpointer.directory / step_name(self.state.step)
        past = f" Nothing to train: the run's end is step {self.total_steps}." if step > self.total_steps else ""
        self.events(
            "finished",
            f"finished {step} steps.{past} Metrics: {self.run.run_directory}/metrics.jsonl. Checkpoint: {newest}",
        )
        if self.failures:
            raise CheckpointError(
                f"training is finished and saved as {newest}, but "
                + "; ".join(self.failures)
                + ". Fix what it names, and run `iwsft export` for what is missing."
            )

    def _call_back(self, result: StepResult) -> StepResult:
        """Call what is due; returns the result, as the run's last one if it stops early."""
        first = [callback for callback in self.callbacks if callback.order == 0]
        self._call([callback for callback in first if callback.due(result)], result)
        if self.stop_early is not None:
            self.stop_early.judge(result.step, result.metrics)
            if self.stop_early.stopped and not result.is_last:
                last = replace(result, total_steps=result.step)
                self._end_here()
                self._call([callback for callback in first if callback.due(last) and not callback.due(result)], last)
                result = last
        self._call([callback for callback in self.callbacks if callback.order > 0 and callback.due(result)], result)
        return result

    def _end_here(self) -> None:
        assert self.stop_early is not None
        step = self.total_steps = self.state.step
        self.events("stopped early", f"the run ends after step {step}: {self.stop_early.reason}.", step=step)

    def _call(self, callbacks: list[Callback], result: StepResult) -> None:
        for callback in callbacks:
            if callback.collective or self.run.is_main:
                if callback.collective:
                    self.watch.at(result.step, callback.phase)
                result.metrics.update(callback.function(result) or {})

    def train_step(self, number: int) -> StepResult | None:
        """Step `number`, counted from 1; None if it led to a rewind."""
        run, started = self.run, time.perf_counter()
        metrics: dict[str, Any] = {"step": number, "epoch": run.sampler.position_at(number - 1).epoch}
        if number in self.monitor.passed_over:
            stopping = run.platform.any(self.stop.requested)
            self._update_lagged_copies(number)
            return self._result(
                metrics | {"loss": None, "nll": None, "grad_norm": None, "skipped": "loss spike"}, stopping
            )
        self.watch.at(number, "reading the batch")
        own_time, phases = run.platform.stopwatch(), PhaseTimes(since=self._ended)
        self.optimizer.zero_grad()  # without the distributed optimizer, .grad still is the last step's main_grad
        with phases.of("data"):
            batches = self.batches.at_step(number - 1, following=number if number < self.total_steps else None)
        self.watch.at(number, "forward and backward")
        self.step.origin = run.origin_at(metrics["epoch"])
        with phases.of("forward and backward"):
            metrics |= self.step.forward_backward(batches, own_time, maximum=False)
        if not metrics["trained_tokens"]:
            ids = on_first_rank(lambda: self._trajectory_ids(number))
            raise DataError(
                f"step {number} would train no token: the masks of its trajectories are all 0 ({', '.join(ids)}). "
                f"Check the corpus with `iwsft inspect`: {run.mixture.described}."
            )
        if number == 1 and run.objective.needs_reference:
            check_start(self.run, metrics)
        with phases.of("optimizer"):
            norm = prepare_gradients(self.optimizer)
            metrics["grad_norm"] = float(norm)
        verdict = self.monitor.judge(metrics["loss"], metrics["grad_norm"], metrics["trained_tokens"])
        self.watch.at(number, "update")
        of_ranks = run.platform.of_every_rank(self.stop.requested, verdict, own_time.seconds(), self.step.weight_max)
        metrics |= self.step.metrics(weight_max=float(of_ranks[:, 3].max()))
        asked_to_stop, worst = (int(column.max()) for column in (of_ranks[:, 0], of_ranks[:, 1]))
        if worst == Verdict.SPIKE and self._roll_back_after_spike(number, metrics):
            return None
        metrics["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        if worst == Verdict.NOT_FINITE:
            self._skip(number, metrics)
        else:
            with phases.of("optimizer"):
                update_parameters(self.optimizer, norm)
            self.schedule.step()
            self.monitor.updated(metrics["loss"])
        self._update_lagged_copies(number)
        with phases.of("optimizer"):
            run.platform.synchronize()
        self._ended = time.perf_counter()
        metrics |= self._measure(self._ended - started) | phases.metrics(own_time.seconds())
        if run.is_main:  # work over the whole global batch
            metrics |= self._throughput(number, metrics)
        if run.platform.world_size > 1:
            metrics |= rank_times(of_ranks[:, 2], run.layout)
        return self._result(metrics, bool(asked_to_stop))

    def _result(self, metrics: dict[str, Any], stopping: bool) -> StepResult:
        return StepResult(metrics["step"], self.total_steps, metrics, stopping, self.run.config)

    def _measure(self, step_time_s: float) -> dict[str, Any]:
        return {
            "step_time_s": step_time_s,
            "peak_memory_bytes": self.run.platform.peak_memory(),
            "skipped_steps": self.monitor.skipped,
        }

    def _throughput(self, number: int, metrics: dict[str, Any]) -> dict[str, Any]:
        lengths, seconds = self.run.mixture.lengths[self._trajectories(number)], metrics["step_time_s"]
        tokens = int(lengths.sum())
        # The policy's model FLOPs only: what a reference or proposal computes does not count.
        frozen = self.run.adapters is not None
        flops = training_flops(self.run.policy.architecture, lengths, metrics["trained_tokens"], frozen=frozen)
        tflops, peak = flops / self.run.platform.world_size / seconds / 1e12, self.peak_tflops
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "tflops_per_gpu": tflops,
            **({"mfu": tflops / peak} if peak else {}),
        }

    def _gather_parameters(self) -> None:
        if self.run.optimizer.overlap_param_gather:
            gather_parameters(self.chunks)

    def _update_lagged_copies(self, number: int) -> None:
        if any(copy.due(number) for copy in self.state.lagged):
            self._gather_parameters()
        for copy in self.state.lagged:
            copy.after_step(number, self.state.policy)

    def _skip(self, number: int, metrics: dict[str, Any]) -> None:
        """Leave parameters, optimizer and schedule unchanged. Raises DivergenceError after too many skipped steps in a row."""
        self.monitor.skip()
        metrics["skipped"] = "not finite"
        what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        self.events(
            "skipped",
            f"step {number} is skipped: {what}. Its trajectories are listed in logs/events.jsonl.",
            step=number,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            trajectories=self._trajectory_ids(number),
        )
        if self.monitor.in_a_row >= self.run.config.run.max_bad_steps:
            self.checkpointer.wait()
            raise DivergenceError(
                f"{self.monitor.in_a_row} steps in a row (run.max_bad_steps) had a loss or gradient that is not finite, the last one at "
                f"step {number} ({what}). {self.checkpointer.last_checkpoint_text} The trajectories are listed in "
                f"{self.run.run_directory}/logs/events.jsonl. Lower optimizer.lr, or remove those trajectories."
            )

    def _roll_back_after_spike(self, number: int, metrics: dict[str, Any]) -> bool:
        """Log a loss spike; with `run.spike.rewind`, go back to an earlier checkpoint. Returns whether that happened."""
        settings = self.run.config.run.spike
        mean = sum(self.monitor.losses) / len(self.monitor.losses)
        self.events(
            "spike",
            f"step {number}: the loss is {metrics['loss']:.4g}; the mean before was {mean:.4g}.",
            step=number,
            loss=metrics["loss"],
            mean=mean,
            trajectories=self._trajectory_ids(number),
        )
        if not settings.rewind:
            return False
        if self.monitor.rewinds >= settings.max_rewinds:
            raise DivergenceError(
                f"the loss spiked again at step {number}, after {self.monitor.rewinds} rewinds (run.spike.max_rewinds). "
                f"{self.checkpointer.last_checkpoint_text} "
                "Lower optimizer.lr, or look at the trajectories in logs/events.jsonl."
            )
        first = max(1, number - settings.batches + 1)
        rewinds, passed_over = self.monitor.rewinds + 1, {*self.monitor.passed_over, *range(first, number + 1)}
        self.watch.at(number, "loading a checkpoint")
        back = self.checkpointer.roll_back(before=first - 1, after=self.run.sampler.start.step)
        if back is None:
            self.events("no rewind", f"no checkpoint is older than step {first}: training continues.", step=number)
            return False
        self.monitor.rewinds, self.monitor.passed_over = rewinds, sorted(passed_over)
        self.events(
            "rewind",
            f"rewound to step {back}; the batches of steps {first} to {number} are not trained on.",
            step=back,
            passed_over=self.monitor.passed_over,
        )
        return True

    def _trajectories(self, number: int) -> np.ndarray:
        """The indices of the trajectories in the global batch of step `number`."""
        return np.concatenate(self.run.sampler.packs_at(number - 1))

    def _trajectory_ids(self, number: int) -> list[str]:
        """Of a global batch, on the main rank, which reads them from the corpora; elsewhere empty."""
        return self.run.mixture.ids(self._trajectories(number).tolist()) if self.run.is_main else []

    def _save_and_leave(self) -> None:
        step = self.state.step
        self.watch.at(step, "saving before leaving")
        saved = self.checkpointer.save_now(leaving=True)
        outcome = "is saved." if saved else f"could not be saved. {self.checkpointer.last_checkpoint_text}"
        self.events(
            "stopped",
            f"stopped after step {step} of {self.total_steps}, which {outcome} Start the run again to continue.",
            step=step,
        )
        raise RequeueError

    def _resume(self) -> None:
        """Continue from the run's newest complete checkpoint, if it has one."""
        self.watch.at(0, "loading a checkpoint")
        info = self.checkpointer.load_newest()
        if info is not None:
            changed = described_changes(self.run.config, info.config)
            parts = [changed, described_layout(self.run.layout, info.layout), *continue_data(self.run, info)]
            changed = "; ".join(part for part in parts if part)
            self._set_total_steps(self.run.total_steps)
            self.events(
                "resumed",
                f"resuming from {info.directory} after step {info.step}" + (f" with {changed}" if changed else ""),
                step=info.step,
            )
            if self.schedule.changed is not None:
                before, now = self.schedule.changed
                self.events("learning rate", self.schedule.described_change(), step=info.step, before=before, now=now)
            if self.stop_early is not None and self.stop_early.stopped:
                self._end_here()

    def _set_total_steps(self, total: int) -> None:
        """After continuing in the data from somewhere: another global batch or corpus gives the epochs another number of steps."""
        if total != self.total_steps:
            self.total_steps = total
            self.schedule.set_total_steps(total)
