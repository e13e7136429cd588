"""What training and the reference computation share: platform, process groups, corpus, plan, and where weights come from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_iwsft.checkpoint import info as checkpoint
from megatron_iwsft.config.schema import Config, Model
from megatron_iwsft.data.batch_builder import BatchBuilder, ReferenceLogprobs, RowShape
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.sampler import Quality, Sampler
from megatron_iwsft.data.scores import normalized_by_source, thresholds_in_scores
from megatron_iwsft.data.tokenizer import load_tokenizer
from megatron_iwsft.distributed.capabilities import fp8_refusal
from megatron_iwsft.distributed.context import ParallelContext, Platform, start
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import DTYPES, RandomInit, ReadingProgress, SafetensorsDirectory, tokenizer_files
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model, load_weights
from megatron_iwsft.objectives.custom import find_objective, source_hash
from megatron_iwsft.objectives.functions import ObjectiveFunction
from megatron_iwsft.reference.sidecar import ReferenceIdentity, weights_fingerprint

# Rows that a rank's FP8 matrix products need to come in multiples of.
_FP8_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


class Weights:
    """A model's weights, wherever they lie: a Hugging Face directory, a checkpoint, or a seed.

    architecture  what they are for
    fingerprint   changes when they do
    described     for people
    """

    architecture: Architecture

    def __init__(self, model: Model, seed: int) -> None:
        self._source: SafetensorsDirectory | RandomInit | None = None
        self.tokenizer_files: list[Path] = []
        if model.hf is not None:
            self._source = SafetensorsDirectory(model.hf)
            self.architecture = self._source.architecture
            self.fingerprint = weights_fingerprint(Path(model.hf), "*.safetensors")
            self.described = model.hf
            self.tokenizer_files = tokenizer_files(Path(model.hf))
        elif model.checkpoint is not None:
            self._info = checkpoint.CheckpointInfo.read(model.checkpoint)
            self.architecture = self._info.architecture
            self.fingerprint = weights_fingerprint(self._info.directory, "*.distcp")
            self.described = str(self._info.directory)
            self.tokenizer_files = sorted((self._info.directory / checkpoint.TOKENIZER).glob("*"))
        else:
            assert model.config is not None
            self.architecture = Architecture.from_hf(model.config, where="model.config")
            self._source = RandomInit(self.architecture, seed)
            self.fingerprint = f"seed {seed}"
            self.described = f"random initialisation with seed {seed}"

        identity = json.dumps([self.architecture.hf, self.fingerprint], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def load(self, chunks: list[PolicyModel], parallel: ParallelContext) -> None:
        """Fill this rank's chunks. Collective over all ranks for a checkpoint."""
        if self._source is not None:
            total = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            with closing(ReadingProgress(self._source, total, shown=dist.get_rank() == 0)) as source:
                load_weights(chunks, source, parallel)
        else:
            checkpoint.load(self._info.directory, chunks)


@dataclass(frozen=True)
class Job:
    """A checked, started run, before any model is built. objective_source: SHA-256 of the file of an objective of one's own."""

    config: Config
    platform: Platform
    parallel: ParallelContext
    data_size: int
    corpus: Corpus
    sampler: Sampler
    objective: ObjectiveFunction
    objective_source: str | None
    policy: Weights
    reference: Weights
    identity: ReferenceIdentity
    evaluation: Corpus | None

    @property
    def run_directory(self) -> Path:
        return Path(self.config.run.dir)

    def watchdog(self) -> Watchdog:
        """To be entered around the job's work, by all ranks."""
        return Watchdog(
            self.platform.rank,
            self.platform.world_size,
            timeout_s=self.config.run.hang_timeout_s,
            logs=self.run_directory / "logs",
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.precision.dtype]

    @property
    def is_main(self) -> bool:
        return self.platform.rank == 0

    def build(self, weights: Weights) -> list[PolicyModel]:
        """This rank's chunks of a model, with `weights`."""
        degrees, precision = self.config.parallel, self.config.precision
        settings = ModelSettings(
            dtype=self.dtype,
            sequence_parallel=degrees.sequence,
            layers_per_stage=tuple(degrees.layers_per_stage) if degrees.layers_per_stage else None,
            recompute=degrees.recompute,
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
        data, parallel = self.config.data, self.config.parallel
        row = data.micro_batch_size * data.seq_length if data.packing == "best_fit" else None
        return BatchBuilder(
            corpus,
            sampler,
            RowShape.of(
                tensor=parallel.tensor,
                context=parallel.context,
                row_length=row,
                alignment=_FP8_ALIGNMENT.get(self.config.precision.fp8 or "", 1),
            ),
            micro_batch_size=data.micro_batch_size,
            data_rank=self.parallel.dp.rank(),
            data_size=self.data_size,
            context_rank=self.parallel.cp.rank(),
            context_size=self.parallel.cp.size(),
            reference=reference,
        )


def start_job(config: Config) -> Job:
    """Check everything that can be checked before a process group exists, then join the job. Collective over all ranks."""
    corpus = Corpus.open(config.data.corpus)
    sampler = make_sampler(config, corpus)
    objective, objective_source = find_objective(config.objective.name), source_hash(config.objective.name)
    policy = Weights(config.model, config.run.seed)
    check_tokenizer(corpus, policy)
    evaluation = Corpus.open(config.evaluation.corpus) if config.evaluation.corpus is not None else None
    if evaluation is not None and evaluation.manifest["tokenizer"] != corpus.manifest["tokenizer"]:
        raise DataError(
            f"evaluation.corpus {evaluation.directory} was made with another tokenizer than {corpus.directory}."
        )
    reference = policy
    if config.reference.model is not None:
        reference = Weights(_model_at(config.reference.model), config.run.seed)
        check_tokenizer(corpus, reference)
        if config.reference.source == "live" and reference.architecture.hidden_size != policy.architecture.hidden_size:
            raise ConfigError(
                "reference.source live needs a reference of the policy's hidden size: their hidden states travel side by side. Use "
                "reference.source: cached."
            )
        if config.reference.refresh and replace(reference.architecture, hf={}) != replace(policy.architecture, hf={}):
            raise ConfigError(
                "reference.refresh copies the policy into the reference: both need the same architecture."
            )
    on_cpu = "cpu" in (config.run.device, os.environ.get("IWSFT_DEVICE"))
    refusal = fp8_refusal(config.precision.fp8, on_cpu=on_cpu) if config.precision.fp8 is not None else None
    if refusal:
        raise ConfigError(f"precision.fp8 {config.precision.fp8} {refusal}. Use precision.fp8: null.")
    if config.objective.router_balance and policy.architecture.experts is None:
        raise ConfigError(
            f"objective.router_balance is {config.objective.router_balance:g}, but the {policy.architecture.family} family has no experts."
        )
    template = corpus.manifest["template"]
    identity = ReferenceIdentity(
        weights=reference.fingerprint,
        tokenizer=corpus.manifest["tokenizer"]["fingerprint"],
        template=template["hash"] if template else "none",
        dtype=config.precision.described,
    )

    config.data_parallel(int(os.environ.get("WORLD_SIZE", "1")))  # refused before ranks wait for each other
    # Twice the watchdog's patience: it can name the ranks that a collective waits for.
    platform = start(config.run.device, timeout_s=2 * config.run.hang_timeout_s)
    data_size = config.data_parallel(platform.world_size)
    degrees = config.parallel
    parallel = platform.parallel(
        tensor=degrees.tensor,
        pipeline=degrees.pipeline,
        context=degrees.context,
        expert=degrees.expert,
        virtual_pipeline=degrees.virtual_pipeline,
        seed=config.run.seed,
    )
    return Job(
        config,
        platform,
        parallel,
        data_size,
        corpus,
        sampler,
        objective,
        objective_source,
        policy,
        reference,
        identity,
        evaluation,
    )


def make_sampler(config: Config, corpus: Corpus) -> Sampler:
    data, scores = config.data, corpus.scores
    if data.quality.normalize:
        scores = normalized_by_source(scores, corpus.meta(["source"])["source"].to_pylist())
    return Sampler(
        corpus.lengths,
        scores,
        seq_length=data.seq_length,
        packing=data.packing,
        global_batch_size=data.global_batch_size,
        quality=Quality(data.quality.mode, thresholds_in_scores(data.quality.thresholds, scores)),
        seed=config.run.seed,
    )


def check_tokenizer(corpus: Corpus, weights: Weights) -> None:
    """Raise DataError if a corpus was made with another tokenizer than the one that comes with the weights."""
    made_with = corpus.manifest["tokenizer"]
    if made_with["vocab_size"] > weights.architecture.vocab_size:
        raise DataError(
            f"{corpus.directory} was made with a tokenizer of {made_with['vocab_size']} tokens, but the model "
            f"({weights.described}) has a vocabulary of {weights.architecture.vocab_size}. Use the model's own tokenizer in "
            "tools/shard_corpus.py, or another model."
        )
    directories = {file.parent for file in weights.tokenizer_files}
    for directory in directories:
        try:
            own = load_tokenizer(directory)
        except DataError:
            continue  # a directory with no fast tokenizer: nothing to compare with
        if own.fingerprint != made_with["fingerprint"]:
            raise DataError(
                f"{corpus.directory} was made with another tokenizer than {weights.described} has. Shard the records again with "
                f"--tokenizer {weights.described}."
            )


def _model_at(path: str) -> Model:
    """A Hugging Face directory or a checkpoint directory, told apart by what lies in it."""
    if (Path(path) / "config.json").exists():
        return Model(hf=path)
    if not Path(path).exists():
        raise CheckpointError(f"reference.model: {path} does not exist.")
    return Model(checkpoint=path)


def all_packs(job: Job) -> Iterator[list]:
    """Global batches that hold every trajectory at least once: epoch 0 as training will see it, then the rest.

    Training's first epoch so meets reference log-probs that were computed in the same rows as its own.
    """
    import numpy as np

    plan = job.sampler.epoch(0)
    for index in range(plan.num_steps):
        yield plan.step(index)
    rest = np.setdiff1d(np.arange(len(job.corpus)), plan.packs.items)
    size = job.config.data.global_batch_size
    for at in range(0, len(rest), size):
        packs = [rest[i : i + 1] for i in range(at, min(at + size, len(rest)))]
        yield packs + [rest[:0]] * (size - len(packs))
