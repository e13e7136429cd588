"""The training run, from a config to its last checkpoint."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from megatron_iwsft import checkpoint
from megatron_iwsft.config import Config
from megatron_iwsft.convert import export_running
from megatron_iwsft.data.corpus import TOKENIZER
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError, DivergenceError
from megatron_iwsft.hooks import (
    Every,
    Hook,
    StepInfo,
    metrics_writer,
    progress_line,
    tensorboard_logger,
    wandb_logger,
)
from megatron_iwsft.job import Job, make_sampler, start_job
from megatron_iwsft.metrics import summarize
from megatron_iwsft.model.hf import DTYPES
from megatron_iwsft.objectives import NEEDS_REFERENCE, Settings
from megatron_iwsft.optim import build_optimizer, build_schedule, wrap_for_gradients
from megatron_iwsft.reference import Sidecar
from megatron_iwsft.step import LossTotals, TrainStep

# How far the policy's log-probs may lie from its own as reference, mean |log-ratio| per token, before the first update. The
# cached reference may have been computed at another layout, which moves the last bits.
START_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def train(config: Config) -> dict[str, Any]:
    """Run (or continue) the training that `config` describes; returns the last step's metrics. Collective over all ranks."""
    job = start_job(config)
    needs_reference = config.objective.name in NEEDS_REFERENCE
    cached = needs_reference and config.reference.source == "cached"
    sidecar = Sidecar(job.corpus, job.identity) if cached else None

    policy = job.build(job.policy)
    live = job.build(job.reference) if needs_reference and not cached else None
    chunks = wrap_for_gradients(policy, config.optimizer)
    optimizer = build_optimizer(chunks, config.optimizer, job.dtype)
    total_steps = job.sampler.total_steps(config.data.epochs, config.data.max_steps)
    schedule = build_schedule(optimizer, config.optimizer, total_steps)
    objective = Settings(
        level=config.objective.level,
        temperature=config.objective.temperature,
        clip=config.objective.clip_range,
        normalize=config.objective.normalize,
    )
    step = TrainStep(chunks, job.parallel, job.platform.device, config.objective.name, objective, reference=live)
    builder = job.batches(job.corpus, job.sampler, sidecar)

    run_dir = Path(config.run.dir)
    resumed_at = _resume(job, policy, optimizer, schedule)
    hooks = _hooks(job, run_dir, resumed_at, total_steps) if job.is_main else []
    evaluate = _evaluation(job, chunks, objective)

    writer = _checkpoint_writer(job)

    def gather_parameters() -> None:
        if config.optimizer.overlap_param_gather:  # else parameters are gathered no sooner than the next forward
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)

    def save(info: StepInfo) -> None:
        gather_parameters()
        writer.save(info.step, policy, optimizer=optimizer, schedule=schedule)

    def export(info: StepInfo) -> None:
        gather_parameters()
        output = run_dir / "hf" / checkpoint.step_name(info.step)
        dtype = DTYPES[config.export.dtype or config.precision.dtype]
        export_running(policy, job.parallel, output, writer.companions(info.step), dtype=dtype)

    saves = Every(config.checkpoint.every, save, at_end=True)
    exports = Every(config.export.every, export, at_end=config.export.at_end)
    metrics: dict[str, Any] = {}
    for number in range(resumed_at, total_steps):
        started = time.perf_counter()
        metrics = {"step": number + 1, "epoch": job.sampler.locate(number)[0]}
        packs = job.sampler.packs_at(number)
        optimizer.zero_grad()  # without the distributed optimizer, .grad is main_grad until told otherwise
        metrics |= step.forward_backward(builder.from_packs(packs))
        if number == 0 and needs_reference:
            _check_start(job, metrics)
        if not math.isfinite(metrics["loss"]) and metrics["trained_tokens"]:
            raise DivergenceError(
                f"the loss of step {number + 1} is {metrics['loss']}; the last checkpoint is unharmed."
            )
        metrics["lr"] = max(group["lr"] for group in optimizer.param_groups)
        _, metrics["grad_norm"], _ = optimizer.step()
        if not math.isfinite(metrics["grad_norm"]):
            raise DivergenceError(
                f"the gradient norm of step {number + 1} is {metrics['grad_norm']}; the last checkpoint is unharmed."
            )
        schedule.step(increment=1)
        job.platform.synchronize()
        metrics["step_time_s"] = time.perf_counter() - started
        metrics["tokens"] = sum(int(job.corpus.lengths[ids].sum()) for ids in packs)
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["step_time_s"]
        metrics["peak_memory_bytes"] = job.platform.peak_memory()
        if not needs_reference:
            metrics = {k: v for k, v in metrics.items() if k not in _REFERENCE_METRICS}
        if evaluate and (number + 1) % config.evaluation.every == 0:
            metrics |= evaluate()
        info = StepInfo(number + 1, total_steps, metrics)
        for hook in hooks:
            hook(info)
        exports(info)
        saves(info)
        writer.poll()
    writer.wait()
    if job.is_main:
        _say(
            f"finished: {total_steps} steps; {run_dir}/metrics.jsonl, {run_dir}/checkpoints/{checkpoint.step_name(total_steps)}"
        )
    return metrics


_REFERENCE_METRICS = frozenset(
    [
        "weight_mean",
        "weight_max",
        "weight_ess",
        "clip_fraction",
        "log_ratio",
        "abs_log_ratio",
        "kl_to_reference",
        "bound_sft",
        "bound_iw",
    ]
)


def _hooks(job: Job, run_dir: Path, resumed_at: int, total_steps: int) -> list[Hook]:
    config = job.config
    for name in ("logs", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    counts = job.corpus.manifest["counts"]
    _say(
        f"{config.run.name}: {config.objective.name} on {len(job.corpus)} trajectories ({counts['trained_tokens']:,} of "
        f"{counts['tokens']:,} tokens trained), {total_steps} steps of {config.data.global_batch_size} sequences; "
        f"{job.platform.device.type}, {job.parallel.describe()}"
    )
    hooks: list[Hook] = [
        metrics_writer(run_dir / "metrics.jsonl", resumed_at),
        Every(config.logging.every, progress_line, True),
    ]
    if config.logging.wandb.mode != "disabled":
        hooks.append(wandb_logger(config.logging.wandb, config.run, config.model_dump()))
    if config.logging.tensorboard:
        hooks.append(tensorboard_logger(run_dir / "logs"))
    return hooks


def _check_start(job: Job, metrics: dict[str, Any]) -> None:
    """Before the first update, a reference that is the initial policy must give the policy's own log-probs."""
    if job.reference.fingerprint != job.policy.fingerprint:
        return
    found, allowed = metrics["abs_log_ratio"], START_TOLERANCE[job.config.precision.dtype]
    if not found <= allowed:  # NaN too
        raise DataError(
            f"policy and reference are the same model, yet their log-probs differ by {found:.3g} per token on the first batch "
            f"(allowed in {job.config.precision.dtype}: {allowed:g}). Model, tokenizer and template match by fingerprint, so the "
            "cached log-probs are damaged or were computed by other code: remove the corpus's reference-* directory and run "
            "tools/precompute_reference.py again, or use reference.source: live."
        )


def _resume(job: Job, policy: list[Any], optimizer: Any, schedule: Any) -> int:
    """Load the newest checkpoint of this run that can be loaded; returns its step, 0 for a fresh run."""
    root = Path(job.config.run.dir) / "checkpoints"
    found = checkpoint.complete_checkpoints(root)
    if found and job.config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume is never, but {root} holds checkpoints. Choose another run.dir, or remove them."
        )
    for directory in found:
        problem = ""
        try:
            info = checkpoint.CheckpointInfo.read(directory)
            checkpoint.load(directory, policy, optimizer=optimizer, schedule=schedule)
        except CheckpointError as error:
            problem = str(error)
        # Every rank must take the same checkpoint, also where only one of them met the damage.
        if job.platform.any(bool(problem)):
            if problem:
                _say(f"skipping a damaged checkpoint: {problem}")
            continue
        _check_same_run(job.config, info.config, directory)
        if job.is_main:
            _say(f"resuming from {directory} after step {info.step}")
        return info.step
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {root} can be loaded. Move them away to start afresh."
        )
    return 0


# What may differ between a run and its continuation; anything else would make it another run.
_MAY_CHANGE = {"run": {"name", "dir", "device"}, "data": {"corpus", "micro_batch_size", "epochs", "max_steps"}}
_MUST_STAY = ("model", "data", "objective", "reference", "precision", "run")


def _check_same_run(now: Config, before: dict[str, Any], directory: Path) -> None:
    """Raise ConfigError naming the first key that a continued run may not change."""
    for section in _MUST_STAY:
        for key, value in getattr(now, section).model_dump().items():
            earlier = before.get(section, {}).get(key, value)
            if value != earlier and key not in _MAY_CHANGE.get(section, ()):
                raise ConfigError(
                    f"{section}.{key} is {value!r}, but {directory} was trained with {earlier!r}. Set it back to continue that run, "
                    "or choose another run.dir for a new one."
                )


def _checkpoint_writer(job: Job) -> checkpoint.CheckpointWriter:
    config, template = job.config, job.corpus.manifest["template"]
    return checkpoint.CheckpointWriter(
        Path(config.run.dir) / "checkpoints",
        architecture=job.policy.architecture,
        config=config.model_dump(),
        layout={**config.parallel.model_dump(), "data": job.data_size},
        tokenizer_files=job.policy.tokenizer_files or sorted((job.corpus.directory / TOKENIZER).iterdir()),
        template_hash=template["hash"] if template else None,
        corpus=job.corpus.fingerprint,
        chat_template=template["source"]
        if template and job.corpus.manifest["settings"]["template"] != "tokenizer"
        else None,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
    )


def _evaluation(job: Job, chunks: list[Any], settings: Settings):
    """A function giving the loss on `evaluation.corpus`, or None."""
    corpus = job.evaluation
    if corpus is None:
        return None
    unweighted = job.config.model_copy(
        update={"data": job.config.data.model_copy(update={"quality": type(job.config.data.quality)()})}
    )
    sampler = make_sampler(unweighted, corpus)
    builder = job.batches(corpus, sampler)
    step = TrainStep(chunks, job.parallel, job.platform.device, "sft", Settings())

    def evaluate() -> dict[str, float]:
        totals = LossTotals(job.platform.device)
        for index in range(sampler.epoch(0).num_steps):
            totals.sums += step.evaluate(builder.at_step(index)).sums
        return {"eval_nll": summarize(totals.sums, totals.weight_max)["nll"]}

    return evaluate


def _say(text: str) -> None:
    print(text, flush=True)
