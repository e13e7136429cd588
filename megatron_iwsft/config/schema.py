"""The configuration of a run: these models are the documentation of its keys. `config_file.load_config` reads one."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.objectives.functions import OBJECTIVES

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Spike(Section):
    """A loss spike: a step's loss more than `deviations` standard deviations above the mean of the last `window` steps' (0 looks
    for none). It is logged; with `rewind`, the run goes back to its newest checkpoint from before the last `batches` steps and
    passes over those batches, at most `max_rewinds` times.
    """

    deviations: NonNegativeFloat = 0.0
    window: Annotated[int, Field(ge=2)] = 50
    rewind: bool = False
    batches: PositiveInt = 2
    max_rewinds: PositiveInt = 3


class Run(Section):
    """name: shown in logs; dir: the run directory; seed: of sampling, packing and random initialisation.

    hang_timeout_s: seconds without progress (loading, a step's phase, a save) after which the job ends and the ranks that did not
    arrive are named. max_bad_steps: so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped.
    """

    name: str
    dir: str
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    max_bad_steps: PositiveInt = 10
    spike: Spike = Spike()


class Model(Section):
    """Where the initial policy comes from: exactly one of the three.

    hf: a Hugging Face directory; checkpoint: a checkpoint directory of this program; config: Hugging Face architecture fields
    for a random initialisation.
    """

    hf: str | None = None
    checkpoint: str | None = None
    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in ("hf", "checkpoint", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of hf, checkpoint and config; found {', '.join(given) or 'none'}")
        return self


class QualityConfig(Section):
    """How scores enter. thresholds: a trajectory stands in the epoch once for every one that its score reaches; a number is a
    score, "90%" the 90th percentile of the corpus's scores. normalize: scores of each source file are scaled to 0 … 1 first.
    """

    mode: Literal["none", "sample", "weight", "thresholds"] = "none"
    thresholds: list[float | str] = []
    normalize: bool = False

    @model_validator(mode="after")
    def _thresholds_given(self) -> QualityConfig:
        if (self.mode == "thresholds") != bool(self.thresholds):
            raise ValueError("mode thresholds goes with a list of thresholds, and only it does")
        for threshold in self.thresholds:
            if isinstance(threshold, str) and not (
                re.fullmatch(r"\d+(\.\d+)?%", threshold) and float(threshold[:-1]) <= 100
            ):
                raise ValueError(f"a threshold is a number, or a percentile from 0% to 100%; found {threshold!r}")
        return self


class Data(Section):
    """corpus: a directory of tools/shard_corpus.py; seq_length: tokens a sequence; the sizes count sequences.

    epochs and max_steps: the run ends with whichever comes first; at least one must be set.
    """

    corpus: str
    seq_length: PositiveInt
    packing: Literal["best_fit", "none"] = "best_fit"
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt = 1
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _has_an_end(self) -> Data:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("needs epochs or max_steps: the run would have no end")
        return self


class Proposal(Section):
    """q: `current` is the stop-gradient of the policy; `ema` an average of it that every `update_every` steps becomes
    decay · average + (1 − decay) · policy; `snapshot` the policy as it was at the last of every `update_every` steps.
    """

    kind: Literal["current", "ema", "snapshot"] = "current"
    decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    update_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Proposal:
        given = {name for name in ("decay", "update_every") if getattr(self, name) is not None}
        wanted = {"current": set(), "ema": {"decay", "update_every"}, "snapshot": {"update_every"}}[self.kind]
        if given != wanted:
            raise ValueError(
                f"kind {self.kind} goes with {' and '.join(sorted(wanted)) or 'nothing else'}; "
                f"found {', '.join(sorted(given)) or 'nothing'}"
            )
        return self


class Objective(Section):
    """See objectives.py. name: sft, iw_sft, dft, psft, or a function of your own as path/to/file.py:function (custom_objective.py).
    clip defaults to [0, 16] at sequence level, [0.2, 1.8] at token level, and [0.8, 1.28] for psft.

    router_balance: coefficient of the load-balance loss of a mixture of experts (model/moe.py), added beside the objective.
    """

    name: str = "iw_sft"
    level: Literal["sequence", "token"] = "sequence"
    temperature: NonNegativeFloat = 1.0
    clip: list[float] | None = None
    normalize: Literal["tokens", "weights", "sequences"] = "tokens"
    proposal: Proposal = Proposal()
    router_balance: NonNegativeFloat = 0.0

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in OBJECTIVES and ":" not in name:
            nearest = difflib.get_close_matches(name, OBJECTIVES, n=1)
            hint = f" (nearest: {nearest[0]})" if nearest else ""
            raise ValueError(f"known are {', '.join(OBJECTIVES)} and path/to/file.py:function{hint}; found {name!r}")
        return name

    @model_validator(mode="after")
    def _has_a_proposal(self) -> Objective:
        built_in = OBJECTIVES.get(self.name)
        if self.proposal.kind != "current" and built_in is not None and not built_in.uses_proposal:
            raise ValueError(f"proposal.kind {self.proposal.kind} belongs to iw_sft; {self.name} has no proposal")
        return self

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> Objective:
        if self.clip is not None and (len(self.clip) != 2 or not 0 <= self.clip[0] < self.clip[1]):
            raise ValueError(f"clip must be [low, high] with 0 ≤ low < high; found {self.clip}")
        if self.router_balance and self.normalize == "weights":
            raise ValueError(
                "router_balance needs normalize: tokens or sequences; what weights add up to is known only after the backward "
                "passes that the balance loss is part of"
            )
        return self


class Reference(Section):
    """cached: a sidecar of tools/precompute_reference.py; live: a frozen second model in the same pipeline pass.

    model: a Hugging Face directory or a checkpoint directory; null is the initial policy. refresh: a live reference becomes the
    current policy again every so many steps, or at the start of each epoch; 0 never. offload: a live reference's weights stay on
    the host, as those of a lagged proposal then do, and come to the device for each micro-batch's forward pass.
    """

    source: Literal["cached", "live"] = "cached"
    model: str | None = None
    refresh: NonNegativeInt | Literal["epoch"] = 0
    offload: bool = False

    @model_validator(mode="after")
    def _live_only(self) -> Reference:
        for name in ("refresh", "offload"):
            if getattr(self, name) and self.source != "live":
                raise ValueError(f"{name} needs source: live; a cached reference is what it was when it was computed")
        return self


class Parallel(Section):
    """Degrees. What tensor × pipeline × context leaves of the world is data parallel. expert: experts of a layer are spread over
    that many of a pipeline stage's ranks, whatever else those are. sequence: Megatron's sequence
    parallelism. layers_per_stage: an uneven pipeline split, layers of each (virtual) stage in order. recompute: activations that
    are computed again in backward instead of kept, of the attention core (selective) or of whole layers (full).
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt | None = None
    context: PositiveInt = 1
    expert: PositiveInt = 1
    sequence: bool = False
    layers_per_stage: list[PositiveInt] | None = None
    recompute: Literal["none", "selective", "full"] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        broken = ParallelLayout(**self.degrees()).broken_rule()
        if broken:
            raise ValueError(broken)
        return self

    def degrees(self) -> dict[str, Any]:
        """What of it makes a `ParallelLayout`."""
        degrees = self.model_dump(exclude={"recompute"})
        return degrees | {"layers_per_stage": tuple(self.layers_per_stage) if self.layers_per_stage else None}


class Precision(Section):
    """dtype: of parameters and activations. fp8: the recipe by which Transformer Engine's layers multiply in FP8, with bf16 around
    them. fp8_parameters: parameters are kept, and gathered by the distributed optimizer, in FP8. bf16_first_layers,
    bf16_last_layers: layers at either end that stay in bf16.
    """

    dtype: Literal["fp32", "bf16"] = "bf16"
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    fp8_parameters: bool = False
    bf16_first_layers: NonNegativeInt = 0
    bf16_last_layers: NonNegativeInt = 0

    @model_validator(mode="after")
    def _consistent(self) -> Precision:
        edges = self.bf16_first_layers or self.bf16_last_layers
        if self.fp8 is None and (self.fp8_parameters or edges):
            raise ValueError(
                "fp8_parameters, bf16_first_layers and bf16_last_layers go with an fp8 recipe; fp8 is null"
            )
        if self.fp8 is not None and self.dtype != "bf16":
            raise ValueError(f"fp8 {self.fp8} needs dtype bf16; it is {self.dtype}")
        if self.fp8 == "delayed" and edges:
            raise ValueError(
                "layers in bf16 at the ends need fp8 tensorwise, blockwise or mxfp8; delayed scaling has one state for all"
            )
        return self

    @property
    def described(self) -> str:
        """What log-probs depend on."""
        edges = (
            f"-{self.bf16_first_layers}-{self.bf16_last_layers}"
            if self.bf16_first_layers or self.bf16_last_layers
            else ""
        )
        return self.dtype + (f"+fp8-{self.fp8}{edges}" if self.fp8 else "")


class Optimizer(Section):
    """AdamW. warmup_fraction is of all steps; clip_grad 0 clips nothing. distributed: Megatron's distributed optimizer.
    overlap_grad_reduce, overlap_param_gather: communicate while computing; the latter needs the distributed optimizer.
    """

    lr: NonNegativeFloat = 1e-5
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Share = 0.05
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0
    distributed: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed: true and overlap_grad_reduce: true")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


class Checkpoint(Section):
    """every: steps between saves, 0 saves at the end only; keep: how many of the newest stay; keep_every: checkpoints of steps
    that are a multiple of it stay too, 0 none; asynchronous: written by a forked process while training goes on; resume: auto
    continues the run's own.

    A save that fails is tried again after `retry_after` steps; `max_failures` in a row end the run.
    """

    every: NonNegativeInt = 100
    keep: PositiveInt = 3
    keep_every: NonNegativeInt = 0
    asynchronous: bool = False
    resume: Literal["auto", "never"] = "auto"
    retry_after: PositiveInt = 10
    max_failures: PositiveInt = 5


class Export(Section):
    """Hugging Face directories of the policy as it trains, in run.dir/hf/step-…, beside what tools/convert_hf.py makes of
    checkpoints. every: steps between, 0 for none; at_end: after the last step; dtype: null is precision.dtype.
    """

    every: NonNegativeInt = 0
    at_end: bool = False
    dtype: Literal["fp32", "bf16", "fp16"] | None = None


class Wandb(Section):
    mode: Literal["offline", "online", "disabled"] = "disabled"
    project: str = "iwsft"


class Logging(Section):
    """warn_ess_below: effective sample size, and warn_clipped_above: share of clipped weights, at which the log says what to do."""

    every: PositiveInt = 1
    warn_ess_below: Share = 0.1
    warn_clipped_above: Share = 0.5
    wandb: Wandb = Wandb()
    tensorboard: bool = False
    callbacks: list[str] = []


class Evaluation(Section):
    """corpus: held-out trajectories whose loss is logged every so many steps. Both or neither."""

    corpus: str | None = None
    every: NonNegativeInt = 0

    @model_validator(mode="after")
    def _both_or_neither(self) -> Evaluation:
        if (self.corpus is None) != (self.every == 0):
            raise ValueError("corpus and every (steps, above 0) go together")
        return self


class Config(Section):
    """A run."""

    run: Run
    model: Model
    data: Data
    objective: Objective = Objective()
    reference: Reference = Reference()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fp8_parameters_are_gathered(self) -> Config:
        if self.precision.fp8_parameters and not self.optimizer.distributed:
            raise ValueError("precision.fp8_parameters needs optimizer.distributed: true")
        return self

    def layout(self, world_size: int) -> ParallelLayout:
        """The parallel layout of `world_size` processes. Raises ConfigError if degrees, batch sizes and world do not fit together."""
        layout = ParallelLayout.for_world(world_size, **self.parallel.degrees())
        layout.micro_batches(global_batch_size=self.data.global_batch_size, micro_batch_size=self.data.micro_batch_size)
        return layout

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
