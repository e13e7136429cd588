"""A checked config, started: its processes have joined a job and can build models and batches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import torch

from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.names import CHECKPOINTS
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Config, Optimizer
from megatron_iwsft.data.batch_builder import BatchBuilder, ReferenceLogprobs, RowShape
from megatron_iwsft.data.checksums import bytes_of
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.mixture import Mixture
from megatron_iwsft.data.sampler import Sampler
from megatron_iwsft.distributed import context
from megatron_iwsft.distributed.agreement import complaints_of_all, on_first_rank
from megatron_iwsft.distributed.capabilities import fp8_refusal, variable_length_attention
from megatron_iwsft.distributed.context import ParallelContext, Platform
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES
from megatron_iwsft.distributed.mcore_compat import check_settings
from megatron_iwsft.distributed.userbuffers import start_userbuffers
from megatron_iwsft.distributed.watchdog import Watchdog
from megatron_iwsft.errors import ConfigError, DataError
from megatron_iwsft.model.adapters import add_adapters
from megatron_iwsft.model.flops import multiply_adds
from megatron_iwsft.model.gpt import ModelSettings, PolicyModel, build_model
from megatron_iwsft.model.memory import local_mask_bytes
from megatron_iwsft.model.packed_attention import fits_at_once
from megatron_iwsft.model.parameters import load_adapters
from megatron_iwsft.objectives.breakdown import Breakdown
from megatron_iwsft.reference.sidecar import ReferenceIdentity
from megatron_iwsft.train.check import CheckedRun
from megatron_iwsft.utils.files import gibibytes
from megatron_iwsft.utils.text import tell

_ANNOUNCED_BYTES = 4 << 30  # reading as much can take a minute
# Of the local backend's attention: with 128k tokens at context parallel 8, in every layer.
LARGEST_LOCAL_MASK = 1 << 30


@dataclass(frozen=True)
class StartedRun(CheckedRun):
    """A checked run whose processes have joined a job, before any model is built."""

    platform: Platform
    parallel: ParallelContext

    @property
    def is_main(self) -> bool:
        return self.platform.rank == 0

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings, with overlapped communication wherever there is some and a GPU can hide it."""
        replicas = self.layout.data * self.layout.context
        return self.config.optimizer.resolved(overlap=self.platform.is_cuda and replicas > 1)

    def watchdog(self) -> Watchdog:
        """To be entered around the job's work, by all ranks."""
        return Watchdog(
            self.platform.rank,
            self.platform.world_size,
            timeout_s=self.config.run.hang_timeout_s,
            logs=self.run_directory / "logs",
        )

    def build_policy(self, *, trained: bool = False) -> list[PolicyModel]:
        """This rank's chunks of the policy at the start of training, with its adapters if it has any. Collective over all ranks."""
        chunks, settings, adapter = self.build(self.policy, trained=trained), self.adapters, self.config.adapter
        if settings is not None:
            add_adapters(chunks, settings, self.parallel, dropout=adapter.dropout, seed=self.config.run.seed)
            load_adapters(chunks, settings, self.initial_adapters(), self.parallel)
        return chunks

    def build(self, weights: InitialWeights, *, trained: bool = False) -> list[PolicyModel]:
        """This rank's chunks of a model, with `weights`. Collective over all ranks.

        trained: FP8 parameters keep what an optimizer and a backward pass need.
        """
        precision, parallel = self.config.precision, self.config.parallel
        settings = ModelSettings(
            dtype=self.dtype,
            recompute=tuple(parallel.recompute) if isinstance(parallel.recompute, list) else parallel.recompute,
            recompute_layers=parallel.recompute_layers,
            overlap_tensor=parallel.overlap_tensor,
            backend=(
                "transformer_engine"
                if self.platform.has_transformer_engine and not precision.fp8_emulation
                else "local"
            ),
            context_communication=parallel.context_communication,
            fp8=precision.fp8,
            fp8_parameters=precision.fp8_parameters,
            fp8_emulation=precision.fp8_emulation,
            amax_history=precision.fp8_amax_history_len,
            amax_algorithm=precision.fp8_amax_compute_algo,
            bf16_edges=(precision.bf16_first_layers, precision.bf16_last_layers),
            megatron=self.config.megatron.given(),
        )
        if parallel.overlap_tensor:
            self._start_userbuffers(weights.architecture.hidden_size)
        with torch.set_grad_enabled(trained):
            chunks = build_model(weights.architecture, self.parallel, self.platform, settings)
        weights.load(chunks, self.parallel)
        return chunks

    def _start_userbuffers(self, hidden_size: int) -> None:
        if not self.platform.has_transformer_engine:
            raise ConfigError("parallel.overlap_tensor needs GPUs and Transformer Engine. Set it to false.")
        precision = self.config.precision
        edges = bool(precision.bf16_first_layers or precision.bf16_last_layers)
        start_userbuffers(
            self._row_shape.fit(0),
            hidden_size,
            tensor=self.layout.tensor,
            fp8=precision.fp8 is not None,
            bf16=precision.fp8 is None or edges,
        )

    @property
    def _row_shape(self) -> RowShape:
        data, layout, recipe = self.config.data, self.layout, self.config.precision.fp8
        overlap = self.config.parallel.overlap_tensor
        return RowShape.of(
            tensor=layout.tensor,
            context=layout.context,
            row_length=data.micro_batch_size * data.seq_length if data.packing == "best_fit" else None,
            packed_multiple=self.config.packed_multiple,
            # On a GPU the allocator prefers rows of one length, and packing leaves little to trim.
            trimmed=not self.platform.is_cuda and layout.pipeline == 1,
            alignment=(
                FP8_RECIPES[recipe].rows(sequence_parallel=layout.sequence, overlap_tensor=overlap) if recipe else 1
            ),
        )

    def batches(
        self,
        corpus: Corpus | Mixture,
        sampler: Sampler,
        reference: ReferenceLogprobs | None = None,
        breakdown: Breakdown | None = None,
    ) -> BatchBuilder:
        """The builder of this rank's micro-batches."""
        data, layout = self.config.data, self.layout
        return BatchBuilder(
            corpus,
            sampler,
            self._row_shape,
            micro_batch_size=data.micro_batch_size,
            data_rank=self.parallel.dp.rank(),
            data_size=layout.data,
            context_rank=self.parallel.cp.rank(),
            context_size=layout.context,
            reference=reference,
            costs=partial(multiply_adds, self.policy.architecture) if data.balance else None,
            groups=None if breakdown is None else breakdown.of,
        )


def start(checked: CheckedRun) -> StartedRun:
    """Join the job. Collective over all ranks. Raises ConfigError if this machine cannot run what the config asks for."""
    config = checked.config
    on_cpu = context.chosen_device(config.run.device) == "cpu"
    precision = config.precision
    real = precision.fp8 is not None and not precision.fp8_emulation
    refusal = fp8_refusal(precision.fp8, on_cpu=on_cpu) if real and precision.fp8 is not None else None
    if refusal:
        raise ConfigError(
            f"precision.fp8 {precision.fp8} {refusal}. Use precision.fp8: null, or emulate it with precision.fp8_emulation: true."
        )
    # Twice the watchdog's timeout: it can then name the ranks that a collective waits for.
    platform = context.start(
        config.run.device, timeout_s=2 * config.run.hang_timeout_s, bind_device=config.run.bind_device
    )
    check_settings(config.megatron.given())
    if not platform.has_transformer_engine or precision.fp8_emulation:
        _refuse_dense_masks(checked, variable_length=platform.is_cuda and variable_length_attention()[0])
    parallel = platform.parallel(checked.layout, seed=config.run.seed)
    for corpus in checked.corpora:
        _check_contents(corpus, config, platform)
    known = {field.name: getattr(checked, field.name) for field in fields(CheckedRun)}
    return StartedRun(**known, platform=platform, parallel=parallel)


def _refuse_dense_masks(checked: CheckedRun, *, variable_length: bool) -> None:
    """Raise ConfigError if the local backend's attention masks would be too large. variable_length: torch has attention without masks."""
    multiple = 2 * checked.layout.context
    corpus = max(checked.corpora, key=lambda corpus: int(corpus.lengths.max(initial=0)))
    longest = -(-int(corpus.lengths.max(initial=0)) // multiple) * multiple
    for weights in (checked.policy, checked.reference):
        at_once = variable_length and checked.layout.context == 1
        if at_once and fits_at_once(checked.dtype, weights.architecture.head_dim):
            continue
        size = local_mask_bytes(weights.architecture, checked.layout, longest)
        if size >= LARGEST_LOCAL_MASK:
            raise ConfigError(
                f"{corpus.directory} has a trajectory of {longest:,} tokens, for which attention without Transformer Engine would need a "
                f"mask of {gibibytes(size)} in every layer (context parallel {checked.layout.context}; the limit is "
                f"{gibibytes(LARGEST_LOCAL_MASK)}). Install Transformer Engine, raise parallel.context, or shard the corpus with a lower "
                "--max-tokens."
            )


def _check_contents(corpus: Corpus, config: Config, platform: Platform) -> None:
    """Read what `data.verify` asks for; each rank reads a share. Collective over all ranks. Raises DataError on all of them."""
    verify, is_main = config.data.verify, platform.rank == 0
    pieces = corpus.pieces(verify, share=platform.rank, shares=platform.world_size, seed=config.run.seed)
    size = bytes_of(corpus.directory, pieces)
    if is_main and size >= _ANNOUNCED_BYTES:
        less = "; `sample` reads less" if verify == "full" else ""
        tell(f"checking {corpus.directory}: each process reads {gibibytes(size)} (data.verify: {verify}{less}).")
    raise_together(corpus.damage(pieces, show_progress=is_main))


def raise_together(complaints: list[str]) -> None:
    """Raise DataError on all ranks if any rank has complaints. Collective over all ranks."""
    found = complaints_of_all(complaints)
    if found:
        more = f" ({len(found) - 1} more files are damaged.)" if len(found) > 1 else ""
        raise DataError(f"{found[0]}{more}")


def reference_identities(run: StartedRun) -> list[ReferenceIdentity]:
    """`CheckedRun.reference_identities`. Collective: the first rank reads for all."""
    return on_first_rank(run.reference_identities)


def starts_as_reference(run: StartedRun) -> bool:
    """Whether policy and reference start from the same weights. Collective: the first rank reads for all."""
    if run.config.adapter.init is not None:
        return False
    if run.reference is run.policy:
        return True
    return on_first_rank(lambda: run.reference.fingerprint == run.policy.fingerprint)


def checkpoint_writer(run: StartedRun) -> CheckpointWriter:
    """The writer of the run's checkpoints. Collective: with adapters, the first rank reads samples of their base."""
    config, mixture = run.config, run.mixture
    return CheckpointWriter(
        run.run_directory / CHECKPOINTS,
        architecture=run.policy.architecture,
        config=config.model_dump(),
        layout=run.layout,
        tokenizer_files=run.policy.tokenizer_files or mixture.tokenizer_files,
        template_hash=mixture.template["hash"] if mixture.template else None,
        chat_template=mixture.exported_template,
        corpora=mixture.fingerprints,
        objective=run.objective_source,
        adapter=on_first_rank(run.adapter_info),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
    )
