"""A config, checked before a job starts: what it names exists and fits together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from megatron_iwsft.checkpoint.info import AdapterInfo
from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.config.schema import Config, Model
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Sampler
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.adapter_mapping import RandomAdapters
from megatron_iwsft.hf.adapters import AdapterSettings
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import DTYPES, TensorSource
from megatron_iwsft.hf.peft import PeftDirectory, refuse_experts
from megatron_iwsft.objectives.custom import find_objective, source_hash
from megatron_iwsft.objectives.functions import Objective, Origin, Settings
from megatron_iwsft.reference.sidecar import ReferenceIdentity, complete_sidecars, sidecar_directory
from megatron_iwsft.train.callbacks import CallbackFunction
from megatron_iwsft.train.callbacks.custom import load_callbacks
from megatron_iwsft.train.held_out import HeldOutSet
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from megatron_iwsft.utils.hub import missing_directory


@dataclass(frozen=True)
class CheckedRun:
    """What a config names, opened and checked against each other. No process group and no device is involved.

    objective_source  SHA-256 of a custom objective's file, else None
    policy, reference the initial weights of each, not yet read; the same object where the reference is the initial policy
    mixture           the corpora to train on, as one sequence of trajectories
    adapters          of the policy, None if all of its weights are trained
    adapter_init      what they start from, None for random ones
    held_out          the sets of `evaluation`
    callbacks         the user's own: name in the config → function
    """

    config: Config
    layout: ParallelLayout
    mixture: Mixture
    sampler: Sampler
    objective: Objective
    objective_source: str | None
    policy: InitialWeights
    reference: InitialWeights
    adapters: AdapterSettings | None
    adapter_init: PeftDirectory | None
    held_out: list[HeldOutSet]
    callbacks: dict[str, CallbackFunction]

    @property
    def corpora(self) -> list[Corpus]:
        """All that are read: those to train on and those to evaluate."""
        return [*self.mixture.corpora, *(held.corpus for held in self.held_out)]

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
        low, high = section.clip or self.objective.clip_at(section.level)
        return Settings(section.level, section.temperature, (low, high), section.normalize)

    def origin_at(self, epoch: int) -> Origin:
        """Where an epoch's trajectories were drawn from, as far as metrics may rely on it.

        After the first epoch, or the first time that a trajectory is in it, the policy has been trained on them; a refreshed reference has
        not sampled them; and trajectories that their scores select are not all of the reference's samples.
        """
        drawn_from = self.config.data.drawn_from
        if drawn_from == "other" or epoch > 0 or self.config.reference.refresh or self._repeats_in_first_epoch:
            return "other"
        selects = self.config.data.quality.mode in ("sample", "thresholds")
        return "reference_filtered" if selects else drawn_from

    @cached_property
    def _repeats_in_first_epoch(self) -> bool:
        return bool(self.sampler.appearances(0).max() > 1)

    def initial_adapters(self) -> TensorSource:
        """The policy's adapters at the start of training, not yet read."""
        assert self.adapters is not None
        return self.adapter_init or RandomAdapters(self.policy.architecture, self.adapters, self.config.run.seed)

    @property
    def total_steps(self) -> int:
        return self.sampler.total_steps(self.config.data.epochs, self.config.data.max_steps)

    def reference_identities(self) -> list[ReferenceIdentity]:
        """What the reference log-probs of each corpus depend on, and so which sidecar they are in. Reads samples of the weights' files."""
        return [self.reference_identity(corpus) for corpus in self.mixture.corpora]

    def reference_identity(self, corpus: Corpus) -> ReferenceIdentity:
        """Of one corpus, such as an evaluation set's. Complete sidecars of a checkpoint's log-probs that version 0.1.0 named in another way
        are found as well; that name costs a sample of every file, so it is computed only if the corpus has a sidecar that could have it.
        """
        dtype = self.config.precision.described
        named = ReferenceIdentity.of(corpus, weights=self.reference.fingerprint, dtype=dtype)
        others = [] if sidecar_directory(corpus, named).exists() else complete_sidecars(corpus)
        if others and self.reference.earlier_fingerprint is not None:
            earlier = replace(named, weights=self.reference.earlier_fingerprint)
            return earlier if sidecar_directory(corpus, earlier) in others else named
        return named

    def adapter_info(self) -> AdapterInfo | None:
        """What checkpoints of adapters say about them; None if weights are trained. Reads samples of the weights' files.

        Raises ConfigError for initial adapters of another base.
        """
        if self.adapters is None:
            return None
        base, init, settings = self.policy.fingerprint, self.adapter_init, self.adapters
        if init is not None and init.base not in (None, base):
            raise ConfigError(
                f"adapter.init {init.directory} belongs to another base than {self.policy.described}: the fingerprint of its base is "
                f"{init.base[:12]}, not {base[:12]}. Use the model that it was trained on."
            )
        return AdapterInfo(rank=settings.rank, alpha=settings.alpha, targets=list(settings.targets), base=base)


def check(config: Config, *, world_size: int) -> CheckedRun:
    """Open what `config` names and check that it fits together and `world_size` processes. Reads no weights, joins no job.

    Raises ConfigError, DataError or CheckpointError.
    """
    layout = config.layout(world_size)
    mixture = open_mixture(config)
    sampler = make_sampler(config, mixture)
    objective, objective_source = find_objective(config.objective.name), source_hash(config.objective.name)
    conflict = objective.proposal_conflict(config.objective.proposal.kind)
    if conflict:
        raise ConfigError(f"objective.{conflict}.")
    policy = InitialWeights(config.model, config.run.seed, once_per_node=True)
    check_layout(layout, policy)
    check_tokenizer(mixture.corpora[0], policy)
    if config.objective.router_balance and policy.architecture.experts is None:
        raise ConfigError(
            f"objective.router_balance is {config.objective.router_balance:g}, but the {policy.architecture.family} family has no experts. "
            "Leave it out, or use a mixture of experts."
        )
    if objective.needs_reference and config.reference.source == "cached":
        check_cacheable(config)
    adapters, init = adapter_settings(config, policy.architecture), config.adapter.init
    reference = _reference(config, mixture.corpora[0], policy)
    held_out = [HeldOutSet.open(entry, config, mixture.corpora[0]) for entry in config.evaluation.sets]
    for corpus in (*mixture.corpora, *(held.corpus for held in held_out)):
        for weights in (policy, reference):
            check_lengths(corpus, weights)
    checked = CheckedRun(
        config=config,
        layout=layout,
        mixture=mixture,
        sampler=sampler,
        objective=objective,
        objective_source=objective_source,
        policy=policy,
        reference=reference,
        adapters=adapters,
        adapter_init=PeftDirectory(init, policy.architecture, adapters) if adapters and init else None,
        held_out=held_out,
        callbacks=load_callbacks(config.logging.callbacks),
    )
    check_profile(checked, world_size)
    return checked


def check_profile(run: CheckedRun, world_size: int) -> None:
    """Raise ConfigError for a profile of steps or ranks that the run does not have."""
    profile = run.config.run.profile
    if profile.steps is None:
        return
    if profile.steps[1] > run.total_steps:
        raise ConfigError(
            f"run.profile.steps ends at step {profile.steps[1]}, but the run ends at step {run.total_steps} (data.epochs). "
            "Lower it, or raise data.epochs."
        )
    beyond = [rank for rank in profile.ranks if rank >= world_size]
    if beyond:
        raise ConfigError(
            f"run.profile.ranks has {beyond[0]}, but the ranks of this job are 0 to {world_size - 1}. Remove it."
        )


def check_layout(layout: ParallelLayout, weights: InitialWeights) -> None:
    """Raise ConfigError if the model does not divide as the parallel degrees ask."""
    broken = layout.broken_rule(weights.architecture)
    if broken:
        raise ConfigError(f"parallel: {broken}.")


def check_cacheable(config: Config) -> None:
    """Raise ConfigError for a precision whose log-probs depend on the steps before them: a sidecar would hold others than training's."""
    if config.precision.fp8 == "delayed":
        raise ConfigError(
            "reference.source cached does not go with precision.fp8 delayed: its scales follow the training steps, and a pass without "
            "gradients leaves them at 1. Use fp8: tensorwise, or reference.source: live."
        )


def adapter_settings(config: Config, architecture: Architecture) -> AdapterSettings | None:
    """The adapters that a config asks for. Raises ConfigError for what the model does not have, CheckpointError for what has no export."""
    section = config.adapter
    if not section.rank:
        return None
    settings = AdapterSettings.of(architecture, rank=section.rank, alpha=section.alpha, targets=section.targets)
    if config.export.every or config.export.at_end:
        refuse_experts(settings)
    return settings


def _reference(config: Config, corpus: Corpus, policy: InitialWeights) -> InitialWeights:
    model = config.model if config.reference.model is None else _model_at(config.reference.model)
    if model == config.model:
        return policy
    reference = InitialWeights(model, config.run.seed, once_per_node=True)
    check_tokenizer(corpus, reference)
    if config.reference.source == "live" and reference.architecture.hidden_size != policy.architecture.hidden_size:
        raise ConfigError(
            "reference.source live needs a reference with the policy's hidden size: their hidden states travel side by side through the "
            "pipeline. Use reference.source: cached."
        )
    if config.reference.refresh and replace(reference.architecture, hf={}) != replace(policy.architecture, hf={}):
        raise ConfigError("reference.refresh copies the policy into the reference: both need the same architecture.")
    return reference


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


def check_lengths(corpus: Corpus, weights: InitialWeights) -> None:
    """Raise DataError if a trajectory is longer than the model's rotary positions are the same for every length."""
    limit, longest = weights.architecture.longest, int(corpus.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise DataError(
            f"{corpus.directory} has a trajectory of {longest:,} tokens, but {weights.described} has rope type dynamic, whose positions "
            f"depend on a text's length beyond {limit:,} tokens. Shard the records with --max-tokens {limit}, or use another model."
        )


def _model_at(path: str) -> Model:
    """A Hugging Face directory or a checkpoint directory, distinguished by what it contains."""
    if (Path(path) / "config.json").exists():
        return Model(hf=path)
    if not Path(path).exists():
        raise CheckpointError(f"reference.model: {missing_directory(path)}")
    return Model(checkpoint=path)
