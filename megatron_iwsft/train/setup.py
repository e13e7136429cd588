"""From a config to a started run: `check` opens and compares what it names, `start` joins the job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Config, Model, QualityConfig
from megatron_iwsft.data.batch_builder import BatchBuilder, ReferenceLogprobs, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.data.scores import normalized_by_source, thresholds_in_scores
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.distributed import context
from megatron_iwsft.distributed.agreement import complaints_of_all, on_first_rank
from megatron_iwsft.distributed.capabilities import fp8_refusal, variable_length_attention
from megatron_iwsft.distributed.context import ParallelContext, Platform
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.directory import DTYPES
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model
from megatron_iwsft.model.memory import local_mask_bytes
from megatron_iwsft.objectives.custom import find_objective, source_hash
from megatron_iwsft.objectives.functions import Objective, Settings
from megatron_iwsft.reference.sidecar import ReferenceIdentity, sidecar_directory
from megatron_iwsft.train.callbacks import CallbackFunction
from megatron_iwsft.train.callbacks.custom import load_callbacks
from megatron_iwsft.utils.files import gibibytes

# Of the local backend's attention: with 128k tokens at context parallel 8, in every layer.
LARGEST_LOCAL_MASK = 1 << 30


@dataclass(frozen=True)
class CheckedRun:
    """What a config names, opened and checked against each other. No process group and no device is involved.

    objective_source  SHA-256 of a custom objective's file, else None
    policy, reference the initial weights of each, not yet read; the same object where the reference is the initial policy
    evaluation        the held-out corpus, if there is one
    callbacks         the user's own: name in the config → function
    """

    config: Config
    layout: ParallelLayout
    corpus: Corpus
    sampler: Sampler
    objective: Objective
    objective_source: str | None
    policy: InitialWeights
    reference: InitialWeights
    evaluation: Corpus | None
    callbacks: dict[str, CallbackFunction]

    @property
    def run_directory(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision.dtype]

    @property
    def settings(self) -> Settings:
        """The objective's settings, defaults filled in."""
        section = self.config.objective
        low, high = section.clip or self.objective.default_clip[section.level]
        return Settings(section.level, section.temperature, (low, high), section.normalize)

    @property
    def total_steps(self) -> int:
        return self.sampler.total_steps(self.config.data.epochs, self.config.data.max_steps)


@dataclass(frozen=True)
class StartedRun(CheckedRun):
    """A checked run whose processes have joined a job, before any model is built."""

    platform: Platform
    parallel: ParallelContext

    @property
    def is_main(self) -> bool:
        return self.platform.rank == 0

    def watchdog(self) -> Watchdog:
        """To be entered around the job's work, by all ranks."""
        return Watchdog(
            self.platform.rank,
            self.platform.world_size,
            timeout_s=self.config.run.hang_timeout_s,
            logs=self.run_directory / "logs",
        )

    def build(self, weights: InitialWeights) -> list[PolicyModel]:
        """This rank's chunks of a model, with `weights`. Collective over all ranks."""
        precision = self.config.precision
        settings = ModelSettings(
            dtype=self.dtype,
            recompute=self.config.parallel.recompute,
            backend="transformer_engine" if self.platform.has_transformer_engine else "local",
            fp8=precision.fp8,
            fp8_parameters=precision.fp8_parameters,
            bf16_edges=(precision.bf16_first_layers, precision.bf16_last_layers),
        )
        chunks = build_model(weights.architecture, self.parallel, self.platform, settings)
        weights.load(chunks, self.parallel)
        return chunks

    def batches(self, corpus: Corpus, sampler: Sampler, reference: ReferenceLogprobs | None = None) -> BatchBuilder:
        """The builder of this rank's micro-batches."""
        data, layout = self.config.data, self.layout
        row = data.micro_batch_size * data.seq_length if data.packing == "best_fit" else None
        return BatchBuilder(
            corpus,
            sampler,
            RowShape.of(
                tensor=layout.tensor,
                context=layout.context,
                row_length=row,
                packed_multiple=self.config.packed_multiple,
                # On a GPU the allocator prefers rows of one length, and packing leaves little to trim.
                trimmed=not self.platform.is_cuda and layout.pipeline == 1,
                alignment=FP8_RECIPES[self.config.precision.fp8].alignment if self.config.precision.fp8 else 1,
            ),
            micro_batch_size=data.micro_batch_size,
            data_rank=self.parallel.dp.rank(),
            data_size=layout.data,
            context_rank=self.parallel.cp.rank(),
            context_size=layout.context,
            reference=reference,
        )


def check(config: Config, *, world_size: int) -> CheckedRun:
    """Open what `config` names and check that it fits together and `world_size` processes. Reads no weights, joins no job.

    Raises ConfigError, DataError or CheckpointError.
    """
    layout = config.layout(world_size)
    corpus = Corpus.open(config.data.corpus)
    sampler = make_sampler(config, corpus)
    objective, objective_source = find_objective(config.objective.name), source_hash(config.objective.name)
    conflict = objective.proposal_conflict(config.objective.proposal.kind)
    if conflict:
        raise ConfigError(f"objective.{conflict}.")
    policy = InitialWeights(config.model, config.run.seed)
    check_tokenizer(corpus, policy)
    if config.objective.router_balance and policy.architecture.experts is None:
        raise ConfigError(
            f"objective.router_balance is {config.objective.router_balance:g}, but the {policy.architecture.family} family has no experts."
        )
    return CheckedRun(
        config=config,
        layout=layout,
        corpus=corpus,
        sampler=sampler,
        objective=objective,
        objective_source=objective_source,
        policy=policy,
        reference=_reference(config, corpus, policy),
        evaluation=_evaluation(config, corpus),
        callbacks=load_callbacks(config.logging.callbacks),
    )


def start(checked: CheckedRun) -> StartedRun:
    """Join the job. Collective over all ranks. Raises ConfigError if this machine cannot run what the config asks for."""
    config = checked.config
    on_cpu = context.chosen_device(config.run.device) == "cpu"
    refusal = fp8_refusal(config.precision.fp8, on_cpu=on_cpu) if config.precision.fp8 is not None else None
    if refusal:
        raise ConfigError(f"precision.fp8 {config.precision.fp8} {refusal}. Use precision.fp8: null.")
    # Twice the watchdog's timeout: it can then name the ranks that a collective waits for.
    platform = context.start(
        config.run.device, timeout_s=2 * config.run.hang_timeout_s, bind_device=config.run.bind_device
    )
    needs_no_masks = checked.layout.context == 1 and platform.is_cuda and variable_length_attention()[0]
    if not platform.has_transformer_engine and not needs_no_masks:
        _refuse_dense_masks(checked)
    parallel = platform.parallel(checked.layout, seed=config.run.seed)
    for corpus in filter(None, (checked.corpus, checked.evaluation)):
        share = {"share": platform.rank, "shares": platform.world_size}
        raise_together(corpus.damage(config.data.verify, seed=config.run.seed, **share))
    return StartedRun(**vars(checked), platform=platform, parallel=parallel)


def _refuse_dense_masks(checked: CheckedRun) -> None:
    """Raise ConfigError if the local backend's attention masks would be too large."""
    multiple = 2 * checked.layout.context
    corpora = filter(None, (checked.corpus, checked.evaluation))
    longest = -(-max(int(corpus.lengths.max()) for corpus in corpora) // multiple) * multiple
    for weights in (checked.policy, checked.reference):
        size = local_mask_bytes(weights.architecture, checked.layout, longest)
        if size >= LARGEST_LOCAL_MASK:
            raise ConfigError(
                f"data.corpus has a trajectory of {longest:,} tokens, for which attention without Transformer Engine would need a mask of "
                f"{gibibytes(size)} in every layer (context parallel {checked.layout.context}; the limit is "
                f"{gibibytes(LARGEST_LOCAL_MASK)}). Install Transformer Engine, raise parallel.context, or shard the corpus with a lower "
                "--max-tokens."
            )


def raise_together(complaints: list[str]) -> None:
    """Raise DataError on all ranks if any rank has complaints. Collective over all ranks."""
    found = complaints_of_all(complaints)
    if found:
        more = f" ({len(found) - 1} more files are damaged.)" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}")


def reference_identity(run: StartedRun) -> ReferenceIdentity:
    """What the run's reference log-probs depend on, and so which sidecar they are in. Collective: the first rank reads for all.

    Sidecars of a checkpoint's log-probs that version 0.1.0 named in another way are found as well.
    """

    def identity(weights: str) -> ReferenceIdentity:
        template = run.corpus.manifest["template"]
        return ReferenceIdentity(
            weights=weights,
            tokenizer=run.corpus.manifest["tokenizer"]["fingerprint"],
            template=template["hash"] if template else "none",
            dtype=run.config.precision.described,
        )

    def found() -> ReferenceIdentity:
        named = identity(run.reference.fingerprint)
        if not sidecar_directory(run.corpus, named).exists() and run.reference.earlier_fingerprint is not None:
            earlier = identity(run.reference.earlier_fingerprint)
            return earlier if sidecar_directory(run.corpus, earlier).exists() else named
        return named

    return on_first_rank(found)


def starts_as_reference(run: StartedRun) -> bool:
    """Whether policy and reference start from the same weights. Collective: the first rank reads for all."""
    if run.reference is run.policy:
        return True
    return on_first_rank(lambda: run.reference.fingerprint == run.policy.fingerprint)


def checkpoint_writer(run: StartedRun) -> CheckpointWriter:
    """The writer of the run's checkpoints."""
    config, template = run.config, run.corpus.manifest["template"]
    named = template and run.corpus.manifest["settings"]["template"] != "tokenizer"
    return CheckpointWriter(
        run.run_directory / CHECKPOINTS,
        architecture=run.policy.architecture,
        config=config.model_dump(),
        layout=run.layout,
        tokenizer_files=run.policy.tokenizer_files or run.corpus.tokenizer_files,
        template_hash=template["hash"] if template else None,
        chat_template=template["source"] if named else None,
        corpus=run.corpus.fingerprint,
        objective=run.objective_source,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
    )


def _reference(config: Config, corpus: Corpus, policy: InitialWeights) -> InitialWeights:
    if config.reference.model is None:
        return policy
    reference = InitialWeights(_model_at(config.reference.model), config.run.seed)
    check_tokenizer(corpus, reference)
    if config.reference.source == "live" and reference.architecture.hidden_size != policy.architecture.hidden_size:
        raise ConfigError(
            "reference.source live needs a reference with the policy's hidden size: their hidden states travel side by side through the "
            "pipeline. Use reference.source: cached."
        )
    if config.reference.refresh and replace(reference.architecture, hf={}) != replace(policy.architecture, hf={}):
        raise ConfigError("reference.refresh copies the policy into the reference: both need the same architecture.")
    return reference


def _evaluation(config: Config, corpus: Corpus) -> Corpus | None:
    if config.evaluation.corpus is None:
        return None
    evaluation = Corpus.open(config.evaluation.corpus)
    if evaluation.manifest["tokenizer"] != corpus.manifest["tokenizer"]:
        raise DataError(
            f"evaluation.corpus {evaluation.directory} was made with a different tokenizer than {corpus.directory}. Shard it again with "
            "the same one."
        )
    evaluation_sampler(config, evaluation)
    return evaluation


def evaluation_sampler(config: Config, evaluation: Corpus) -> Sampler:
    """Every trajectory of the held-out corpus once. Raises DataError if one does not fit into a row."""
    data = config.data.model_copy(update={"quality": QualityConfig()})
    return make_sampler(config.model_copy(update={"data": data}), evaluation)


def make_sampler(config: Config, corpus: Corpus) -> Sampler:
    """The sampler that a config's `data` section describes."""
    data, scores = config.data, corpus.scores
    if data.quality.normalize:
        scores = normalized_by_source(scores, corpus.meta(["source"])["source"].to_pylist())
    multiple = config.packed_multiple
    return Sampler(
        corpus.lengths if multiple == 1 else -(-corpus.lengths // multiple) * multiple,
        scores,
        seq_length=data.seq_length,
        packing=data.packing,
        global_batch_size=data.global_batch_size,
        quality=Quality(data.quality.mode, thresholds_in_scores(data.quality.thresholds, scores)),
        seed=config.run.seed,
    )


def check_tokenizer(corpus: Corpus, weights: InitialWeights) -> None:
    """Raise DataError if a corpus was made with another tokenizer than the weights come with."""
    made_with = corpus.manifest["tokenizer"]
    if made_with["vocab_size"] > weights.architecture.vocab_size:
        raise DataError(
            f"{corpus.directory} was made with a tokenizer of {made_with['vocab_size']} tokens, but the model ({weights.described}) has a "
            f"vocabulary of {weights.architecture.vocab_size}. Shard the records with the model's own tokenizer, or use another model."
        )
    directories = {file.parent for file in weights.tokenizer_files}
    for directory in directories:
        try:
            own = load_tokenizer(directory)
        except DataError:
            continue  # no tokenizer that we can read: nothing to compare with
        if own.fingerprint != made_with["fingerprint"]:
            raise DataError(
                f"{corpus.directory} was made with a different tokenizer than {weights.described} has. Shard the records again with "
                f"--tokenizer {weights.described}."
            )


def _model_at(path: str) -> Model:
    """A Hugging Face directory or a checkpoint directory, distinguished by what it contains."""
    if (Path(path) / "config.json").exists():
        return Model(hf=path)
    if not Path(path).exists():
        raise CheckpointError(f"reference.model: {path} does not exist.")
    return Model(checkpoint=path)


def all_packs(run: CheckedRun) -> Iterator[list[np.ndarray]]:
    """Global batches with every trajectory at least once: epoch 0 as training will see it, then the rest.

    So the reference log-probs of training's first epoch are computed in the same rows as the policy's.
    """
    plan = run.sampler.epoch(0)
    for index in range(plan.num_steps):
        yield plan.step(index)
    rest = np.setdiff1d(np.arange(len(run.corpus)), plan.packs.items)
    size = run.config.data.global_batch_size
    for at in range(0, len(rest), size):
        packs = [rest[i : i + 1] for i in range(at, min(at + size, len(rest)))]
        yield packs + [rest[:0]] * (size - len(packs))
