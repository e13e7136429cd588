"""`--dry-run`: what a training or reference job would do, in one process without a GPU. Reads no weights and writes nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_iwsft.checkpoint.info import CheckpointInfo, complete_checkpoints
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.config.schema import Config, Model
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Sampler
from megatron_iwsft.distributed.mcore_compat import check_settings
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.adapters import num_parameters as num_adapter_parameters
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.flops import forward_flops, training_factor
from megatron_iwsft.model.memory import DTYPE_BYTES, OPTIMIZER_BYTES, Cost, cost, num_parameters, stage_parameters
from megatron_iwsft.objectives.custom import find_objective
from megatron_iwsft.reference.sidecar import Sidecar, SidecarWriter
from megatron_iwsft.train.check import (
    CheckedRun,
    adapter_settings,
    check,
    check_cacheable,
    check_layout,
)
from megatron_iwsft.train.continuation import check_same_run, described_changes
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from megatron_iwsft.utils.json_files import read_json

Command = Literal["train", "reference"]


@dataclass
class Plan:
    """lines: (what, text) for people. missing: what the job would need and this machine lacks. memory: of the fullest GPU.

    copies  bytes that a live reference and a lagged proposal add to it
    flops   model FLOPs per process, of the complete job; None if the corpus or the model is not here
    trained  share of the job's steps that are done: it would continue after them
    """

    lines: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    memory: Cost | None = None
    copies: int = 0
    flops: float | None = None
    trained: float = 0.0

    def add(self, what: str, text: str) -> None:
        self.lines.append((what, text))

    def __str__(self) -> str:
        rows = [*self.lines, *(("missing", text) for text in self.missing)]
        return "\n".join(f"{what:12} {text}" for what, text in rows)


def plan(
    command: Command, config: Config, *, world_size: int, model_config: str | None = None, allow_missing: bool = False
) -> Plan:
    """Check `config` as the job's start would, for `world_size` processes, and say what the job would do.

    model_config   a config.json to plan with, in place of the weights that `model` and `reference.model` name
    allow_missing  list a model, corpus or sidecar that is not there, and a disk that is too small, in `Plan.missing`. Otherwise the
                   first three raise CheckpointError or DataError

    Not checked: what only the GPUs' machine can tell (devices, FP8, Transformer Engine), and the contents of large files.
    """
    if model_config is not None:
        config = _with_model(config, model_config)
    check_settings(config.megatron.given())
    if command == "reference":
        check_cacheable(config)
    layout, out = config.layout(world_size), Plan()
    out.add("run", f"{config.run.name}: {command} with objective {config.objective.name}, in {config.run.dir}")
    _describe_layout(out, config, layout)
    here = _find(config, world_size, allow_missing)
    out.missing += here.absent
    if here.weights is not None:
        check_layout(layout, here.weights)
        _describe_model(out, here.weights, model_config)
    if here.mixture is not None and here.sampler is not None:
        _describe_data(out, here.mixture, here.sampler, config, here.weights, command, world_size)
    if here.run is not None and not model_config:  # log-probs belong to weights
        _describe_reference(out, here.run, command, allow_missing)
    if here.weights is not None:
        out.memory = _memory(out, config, layout, here.weights.architecture, command)
    if command == "train" and here.run is not None:
        _describe_continuation(out, here.run)
    if command == "train" and here.weights is not None:
        _describe_writes(out, config, here.weights.architecture, here.steps)
    return out


@dataclass(frozen=True)
class _Found:
    """What a config names and this machine has. run: if that is everything. absent: a sentence about each thing that it lacks."""

    config: Config
    run: CheckedRun | None
    weights: InitialWeights | None
    mixture: Mixture | None
    sampler: Sampler | None
    absent: list[str]

    @property
    def steps(self) -> int | None:
        """Of the complete run; None if they are not known."""
        data = self.config.data
        return data.max_steps if self.sampler is None else self.sampler.total_steps(data.epochs, data.max_steps)


def _find(config: Config, world_size: int, allow_missing: bool) -> _Found:
    absent = _absent(config) if allow_missing else []
    kinds, sentences = {kind for kind, _ in absent}, [sentence for _, sentence in absent]
    if "evaluation" in kinds:
        config = config.model_copy(update={"evaluation": type(config.evaluation)()})
    if kinds.isdisjoint({"model", "corpus"}):
        run = check(config, world_size=world_size)
        return _Found(config, run, run.policy, run.mixture, run.sampler, sentences)
    weights = None if "model" in kinds else InitialWeights(config.model, config.run.seed)
    mixture = None if "corpus" in kinds else open_mixture(config)
    sampler = make_sampler(config, mixture) if mixture is not None else None
    return _Found(config, None, weights, mixture, sampler, sentences)


def _with_model(config: Config, path: str) -> Config:
    """`config` with random weights of the architecture in a config.json, and no other reference than those."""
    found = read_json(
        Path(path), dict[str, Any], CheckpointError, advice="Give the config.json of a Hugging Face model."
    )
    ignored = Architecture.from_hf(found, where=path).ignored
    model = Model(config={key: value for key, value in found.items() if key not in ignored})
    reference = config.reference.model_copy(update={"model": None})
    return config.model_copy(update={"model": model, "reference": reference})


def _absent(config: Config) -> list[tuple[str, str]]:
    """(kind, sentence) of each model and corpus that is not on this machine."""
    models = {
        "model.hf": config.model.hf,
        "model.checkpoint": config.model.checkpoint,
        "reference.model": config.reference.model,
    }
    found = [
        (
            "model",
            f"{key} {path} is not here: the model is not checked. Plan with its config.json: --model-config FILE.",
        )
        for key, path in models.items()
        if path is not None and not Path(path).exists()
    ]
    corpora = [("corpus", "data.corpus", entry.corpus) for entry in config.data.mixture]
    corpora += [("evaluation", entry.name, entry.corpus) for entry in config.evaluation.sets]
    return found + [
        (
            kind,
            f"{key} {path} is not here: {'steps and tokens are not known' if kind == 'corpus' else 'it is not checked'}.",
        )
        for kind, key, path in corpora
        if not Path(path).exists()
    ]


def _describe_layout(out: Plan, config: Config, layout: ParallelLayout) -> None:
    data, world = config.data, layout.world_size
    count = layout.micro_batches(global_batch_size=data.global_batch_size, micro_batch_size=data.micro_batch_size)
    stated = config.parallel.world_size
    other = f"; the config is meant for {stated}" if stated not in (None, world) else ""
    out.add("processes", f"{world}{other}: {layout.describe()}")
    out.add(
        "batch",
        f"{data.global_batch_size} × {data.seq_length:,} tokens per step; micro-batches of each data-parallel rank: {count} × "
        f"{data.micro_batch_size}",
    )


def _describe_model(out: Plan, weights: InitialWeights, model_config: str | None) -> None:
    arch = weights.architecture
    experts = f", {arch.experts.per_token} of {arch.experts.count} experts" if arch.experts else ""
    described = f"{model_config} (the weights are not checked)" if model_config else weights.described
    out.add(
        "model",
        f"{described}: {arch.family}, {arch.num_layers} layers of {arch.hidden_size}{experts}, "
        f"{num_parameters(arch):.3g} parameters",
    )


def _describe_data(
    out: Plan,
    mixture: Mixture,
    sampler: Sampler,
    config: Config,
    weights: InitialWeights | None,
    command: Command,
    world_size: int,
) -> None:
    counts, data = mixture.counts, config.data
    out.add(
        "corpus",
        f"{mixture.described}: {len(mixture):,} trajectories, {counts['trained_tokens']:,} of {counts['tokens']:,} tokens trained",
    )
    epoch = sampler.epoch(0) if command == "train" else sampler.covering()
    items = epoch.packs.items
    tokens, sequences = int(mixture.lengths[items].sum()), len(epoch.packs)
    steps = sampler.total_steps(data.epochs, data.max_steps) if command == "train" else epoch.num_steps
    passes = steps / epoch.num_steps
    verb = "steps" if command == "train" else "batches"
    out.add(verb, f"{steps:,}" + (f": {passes:.4g} epochs of {epoch.num_steps:,}" if command == "train" else ""))
    out.add(
        "packing",
        f"{len(items):,} trajectories in {sequences:,} sequences{' per epoch' if command == 'train' else ''}; "
        f"{tokens / (sequences * data.seq_length):.1%} of their tokens are used",
    )
    out.add("tokens", f"{tokens * passes:,.0f}" if command == "train" else f"{tokens:,}")
    if weights is not None:
        # The share of trained tokens is the corpus's: an epoch may draw trajectories more than once.
        trained = round(counts["trained_tokens"] / counts["tokens"] * tokens)
        forward = forward_flops(weights.architecture, mixture.lengths[items].astype(np.int64), trained) * passes
        flops = forward * training_factor(frozen=bool(config.adapter.rank)) if command == "train" else forward
        out.flops = flops / world_size
        out.add("compute", f"{flops:.3g} model FLOPs, {out.flops:.3g} per process")


def _describe_reference(out: Plan, run: CheckedRun, command: Command, allow_missing: bool) -> None:
    """Which sidecars exist. Raises DataError for one that training needs and that is not complete, unless missing ones are allowed."""
    cached = run.objective.needs_reference and run.config.reference.source == "cached"
    if command == "train" and not cached:
        out.add("reference", run.config.reference.source if run.objective.needs_reference else "none is needed")
        return
    for corpus, identity in zip(run.mixture.corpora, run.reference_identities(), strict=True):
        if command == "reference":
            writer = SidecarWriter(corpus, identity)
            size = 4 * int(corpus.lengths.sum())
            done = "is complete already" if writer.complete else f"would be written, {_size(size)}"
            out.add("writes", f"{writer.directory} {done}")
            if not writer.complete:
                _check_free(out, writer.directory, size)
            continue
        try:
            out.add("reference", f"{Sidecar(corpus, identity).directory}")
        except DataError as error:
            if not allow_missing:
                raise
            out.missing.append(str(error))


def _memory(out: Plan, config: Config, layout: ParallelLayout, arch: Architecture, command: Command) -> Cost:
    data, parallel = config.data, config.parallel
    dtype = config.precision.dtype
    whole = parallel.recompute == "full" and parallel.recompute_layers is None
    micro_batches = layout.micro_batches(
        global_batch_size=data.global_batch_size, micro_batch_size=data.micro_batch_size
    )
    estimate = cost(
        arch,
        layout,
        seq_length=data.seq_length,
        micro_batch_size=data.micro_batch_size,
        micro_batches=micro_batches,
        recompute="full" if whole else "none",
        dtype=dtype,
        distributed=config.optimizer.distributed,
        adapters=adapter_settings(config, arch),
    )
    if command == "reference":
        out.add(
            "memory", f"{_size(estimate.parameters)} of weights per process (estimate), and one layer's activations"
        )
        return estimate
    frozen = _frozen_copies(config, DTYPE_BYTES[dtype]) * max(map(sum, stage_parameters(arch, layout)))
    out.copies = frozen
    parts = [
        f"weights {_size(estimate.parameters)}",
        f"gradients {_size(estimate.gradients)}",
        f"optimizer {_size(estimate.optimizer)}",
        f"activations {'at most ' if parallel.recompute != 'none' and not whole else ''}{_size(estimate.activations)}",
        *([f"reference and proposal {_size(frozen)}"] if frozen else []),
    ]
    out.add(
        "memory",
        f"{_size(estimate.total + frozen)} per process (estimate): {', '.join(parts)}; besides these, a few GB of logits and "
        f"communication. Pipeline idle for {estimate.bubble:.0%}",
    )
    return estimate


def _frozen_copies(config: Config, size: int) -> int:
    """Bytes per parameter of a live reference and of a lagged proposal, which a GPU holds besides the policy."""
    if config.reference.offload:
        return 0
    live = find_objective(config.objective.name).needs_reference and config.reference.source == "live"
    average = 0 if config.adapter.rank else 4  # of adapters alone
    proposal = {"current": 0, "snapshot": size, "ema": size + average}[config.objective.proposal.kind]
    return (size if live else 0) + proposal


def _describe_continuation(out: Plan, run: CheckedRun) -> None:
    """From which checkpoint the run would continue. Raises ConfigError if its checkpoints belong to another run."""
    found = complete_checkpoints(run.run_directory / CHECKPOINTS)
    if not found:
        return
    if run.config.checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.resume is never, but {found[0].parent} holds checkpoints. Choose another run.dir."
        )
    info = CheckpointInfo.read(found[0])
    check_same_run(run, info, run.adapter_info())
    changed = described_changes(run.config, info.config)
    out.trained = min(1.0, info.step / run.total_steps)
    out.add("continues", f"from {info.directory}, after step {info.step}" + (f", with {changed}" if changed else ""))


def _describe_writes(out: Plan, config: Config, arch: Architecture, steps: int | None) -> None:
    checkpoint, dtype = config.checkpoint, config.precision.dtype
    lagged = 0 if config.objective.proposal.kind == "current" else 4
    adapters = adapter_settings(config, arch)
    parameters = num_parameters(arch) if adapters is None else num_adapter_parameters(arch, adapters)
    size = parameters * (DTYPE_BYTES[dtype] + OPTIMIZER_BYTES[dtype] + lagged)
    text = f"checkpoints of {_size(size)} after " + (
        f"every {checkpoint.every} steps and the last" if checkpoint.every else "the last step"
    )
    kept = 1
    if steps is not None:
        saved = [*range(checkpoint.every, steps, checkpoint.every), steps] if checkpoint.every else [steps]
        forever = sum(1 for step in saved if checkpoint.keep_every and step % checkpoint.keep_every == 0)
        kept = min(len(saved), checkpoint.keep + forever)
        text += f": {len(saved)} saves, the newest {min(len(saved), checkpoint.keep)} kept"
        text += f" and {forever} forever" if forever else ""
    # The oldest is removed once the next one is complete.
    need = size * (kept + (1 if steps is None or checkpoint.every else 0))
    exports = (steps // config.export.every if config.export.every and steps else 0) + config.export.at_end
    if exports:
        bytes_each = DTYPE_BYTES["fp32" if (config.export.dtype or dtype) == "fp32" else "bf16"] * parameters
        need += exports * bytes_each
        text += f"; {exports} Hugging Face exports of {_size(bytes_each)}"
    out.add("writes", f"{config.run.dir}: {text}; {_size(need)} at most")
    _check_free(out, Path(config.run.dir), need)


def _check_free(out: Plan, directory: Path, need: int) -> None:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    out.add("disk", f"{_size(free)} free in {existing}")
    if free < need:
        out.missing.append(f"{existing} has {_size(free)} free; {_size(need)} may be needed.")


def _size(count: int) -> str:
    unit, name = next((pair for pair in ((1e12, "TB"), (1e9, "GB")) if count >= pair[0]), (1e6, "MB"))
    return f"{count / unit:.3g} {name}"
