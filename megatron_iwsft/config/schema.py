"""The schema of a config file: pydantic models, one per section; the longest ones in modules of their own.

`iwsft config` prints it; `loader.load_config` reads a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from megatron_iwsft.config.adapter import Adapter
from megatron_iwsft.config.data import Data
from megatron_iwsft.config.evaluation import Best, Evaluation, MetricChoice, StopEarly, metric_problem
from megatron_iwsft.config.megatron import Megatron
from megatron_iwsft.config.objective import Objective, Reference
from megatron_iwsft.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, Share
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe
from megatron_iwsft.distributed.parallel_layout import ParallelLayout


class Spike(Section):
    """Loss spikes: when a step counts as one, and what to do then."""

    deviations: NonNegativeFloat = 0.0
    """A step is a spike if its loss is more than this many standard deviations above the mean of the last `window`. 0: no detection."""
    window: Annotated[int, Field(ge=2)] = 50
    """Number of preceding steps whose losses give mean and standard deviation."""
    rewind: bool = False
    """After a spike, go back to the newest checkpoint from before the last `batches` steps and skip their batches.
    False: only log the spike."""
    batches: PositiveInt = 2
    """Steps whose batches a rewind skips; the spike is the last of them."""
    max_rewinds: PositiveInt = 3
    """A spike after this many rewinds ends the run."""


class Profile(Section):
    """torch profiler: a trace for Perfetto, a table of where the time went, on CUDA also a memory snapshot; in logs/profile/."""

    steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """[first, last] step to profile, as [10, 12]. null: no profile."""
    ranks: list[NonNegativeInt] = [0]
    """Ranks that are profiled, each writing its own files."""

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps must be [first, last]; found {self.steps}")
        return self


class Run(Section):
    """The run: its directory, seed, device, and when to give up."""

    name: str
    """Name of the run in the log and in wandb."""
    dir: str
    """Run directory, created if missing: config, metrics, checkpoints, logs."""
    seed: NonNegativeInt = 0
    """Seed of sampling, packing and random initialization."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL if torch sees a GPU, else CPU with gloo. The environment variable IWSFT_DEVICE overrides auto."""
    bind_device: bool | None = None
    """Give NCCL each process's GPU when the job starts (torch's `device_id`). Every process group then is a split of the world's
    communicator, in which all ranks take part. null: on a single node only; with many nodes this makes the start slower."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without progress (in loading, a phase of a step, or a save) after which the job ends.
    The ranks that stopped responding are named and all stacks are written to logs/."""
    max_bad_steps: PositiveInt = 10
    """End the run after this many consecutive steps with a non-finite loss or gradient. Fewer are skipped."""
    spike: Spike = Spike()
    stop_early: StopEarly | None = None
    profile: Profile = Profile()


class Model(Section):
    """Where the initial policy comes from: exactly one of hf, checkpoint and config."""

    hf: str | None = None
    """Hugging Face directory: config.json, safetensors, tokenizer. Each rank reads only its own shard."""
    checkpoint: str | None = None
    """Checkpoint or run directory of this program (of a run, its latest checkpoint)."""
    config: dict[str, Any] | None = None
    """Architecture in Hugging Face's config.json fields, for random initialization."""

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in ("hf", "checkpoint", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of hf, checkpoint and config; found {', '.join(given) or 'none'}")
        return self


RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]


class Parallel(Section):
    """Parallel degrees. The data-parallel degree is the number of processes / (tensor × pipeline × context)."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree."""
    virtual_pipeline: PositiveInt | None = None
    """Model chunks per rank in an interleaved pipeline schedule, 2 or more. null: not interleaved."""
    context: PositiveInt = 1
    """Context-parallel degree: each sequence is split over this many ranks."""
    expert: PositiveInt = 1
    """Expert-parallel degree, within the ranks of a pipeline stage. Experts are never split by tensor parallelism."""
    sequence: bool = False
    """Megatron's sequence parallelism; needs tensor ≥ 2."""
    overlap_tensor: bool = False
    """Overlap tensor-parallel communication with matmuls, through userbuffers of Transformer Engine; worth trying from tensor 4.
    Needs sequence: true, context: 1, data.packing: best_fit (rows of one length), NVLink between a node's GPUs, and no fp8: blockwise."""
    layers_per_stage: list[PositiveInt] | None = None
    """Uneven pipeline split: number of layers of each (virtual) stage, in order. null: an even split."""
    context_communication: Literal["p2p", "all_gather", "a2a"] | None = None
    """How context-parallel ranks exchange keys and values in Transformer Engine's attention.
    p2p: in a ring. all_gather: all at once. a2a: heads for tokens; context must divide the heads of a tensor-parallel rank.
    null: p2p, and a2a for a model with sliding windows, which p2p cannot compute."""
    recompute: Literal["none", "selective", "full"] | list[RecomputedModule] = "none"
    """Activations recomputed in the backward pass. full: of whole layers. selective: of core attention, as [core_attn].
    A list: of these parts of each layer. layernorm: norms that are not fused with the projection after them; moe_act: the experts'
    activation function, and moe: the whole mixture of experts."""
    recompute_layers: PositiveInt | None = None
    """With recompute: full, only this many layers at the start of each (virtual) stage. null: all of them."""
    world_size: PositiveInt | None = None
    """Number of processes, one per GPU, that the config is meant for: what `--dry-run` plans. A job may have any other number."""

    @model_validator(mode="after")
    def _consistent(self) -> Parallel:
        # The data-parallel degree is not known yet: one that every expert-parallel degree fits.
        broken = ParallelLayout(**self.degrees(), data=self.expert).broken_rule()
        if broken:
            raise ValueError(broken)
        if self.overlap_tensor and not (self.sequence and self.context == 1):
            raise ValueError("overlap_tensor needs sequence: true and context: 1")
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f"recompute_layers needs recompute: full; it is {self.recompute}")
        if self.recompute == []:
            raise ValueError("recompute is an empty list; use none")
        return self

    def degrees(self) -> dict[str, Any]:
        """Arguments for `ParallelLayout`."""
        others = {"recompute", "recompute_layers", "context_communication", "overlap_tensor", "world_size"}
        degrees = self.model_dump(exclude=others)
        return degrees | {"layers_per_stage": tuple(self.layers_per_stage) if self.layers_per_stage else None}


class Precision(Section):
    """Number formats of parameters, activations and matmuls."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of parameters and activations."""
    fp8: FP8Recipe | None = None
    """FP8 recipe of Transformer Engine's matmuls, with everything else in bf16. null: no FP8."""
    fp8_parameters: bool = False
    """Store parameters in FP8 (tensorwise or blockwise), and all-gather them in FP8 in the distributed optimizer."""
    fp8_amax_history_len: PositiveInt | None = None
    """With fp8 delayed: number of past steps whose largest values the scales are taken from. null: 1024.
    Emulated: number of past passes; null: 16."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] | None = None
    """With fp8 delayed: whether a scale fits the largest value of that history or its most recent one. null: max."""
    fp8_emulation: bool = False
    """Emulate the recipe in torch, on any device, CPUs too: what its rounding does to log-probs, weights and losses can be studied without
    the hardware. Much slower than bf16, and no substitute for the GPU's own arithmetic. Dense models only."""
    bf16_first_layers: NonNegativeInt = 0
    """With fp8: number of layers at the start of the model that stay in bf16."""
    bf16_last_layers: NonNegativeInt = 0
    """With fp8: number of layers at the end of the model that stay in bf16."""

    @model_validator(mode="after")
    def _consistent(self) -> Precision:
        edges = self.bf16_first_layers or self.bf16_last_layers
        if self.fp8 is None and (self.fp8_parameters or self.fp8_emulation or edges):
            raise ValueError(
                "fp8_parameters, fp8_emulation, bf16_first_layers and bf16_last_layers need an fp8 recipe; fp8 is null"
            )
        if self.fp8 != "delayed" and (self.fp8_amax_history_len or self.fp8_amax_compute_algo):
            raise ValueError(
                f"fp8_amax_history_len and fp8_amax_compute_algo need fp8 delayed, which scales by history; it is {self.fp8 or 'null'}"
            )
        refusal = FP8_RECIPES[self.fp8].no_parameters if self.fp8 is not None and self.fp8_parameters else None
        if refusal:
            raise ValueError(f"fp8_parameters does not go with fp8 {self.fp8}: {refusal}. Use tensorwise or blockwise")
        if self.fp8_parameters and self.fp8_emulation:
            raise ValueError("fp8_emulation keeps parameters in dtype; fp8_parameters must be false")
        if self.fp8 is not None and self.dtype != "bf16":
            raise ValueError(f"fp8 {self.fp8} needs dtype bf16; it is {self.dtype}")
        if self.fp8 == "delayed" and edges:
            raise ValueError(
                "bf16_first_layers and bf16_last_layers need fp8 tensorwise, blockwise or mxfp8; delayed scaling has one state for all"
            )
        return self

    @property
    def scaled_by_steps(self) -> bool:
        """Whether scales follow the training steps: until the first of them they are 1. Emulation's follow its own passes."""
        return self.fp8 == "delayed" and not self.fp8_emulation

    @property
    def described(self) -> str:
        """The settings that log-probs depend on, as one word; part of a reference sidecar's identity."""
        edges = (
            f"-{self.bf16_first_layers}-{self.bf16_last_layers}"
            if self.bf16_first_layers or self.bf16_last_layers
            else ""
        )
        return self.dtype + (f"+fp8-{self.fp8}{edges}{'-emulated' if self.fp8_emulation else ''}" if self.fp8 else "")


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: NonNegativeFloat = 1e-5
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay from lr to min_lr after warm-up. cosine, linear: over all remaining steps. constant: none.
    wsd: warm-up, then constant, then linear over the last steps (`decay_fraction`). Raising data.max_steps before its decay begins does
    not change the learning rate that a continued run starts with."""
    warmup_fraction: Share = 0.05
    """Share of all steps with linear warm-up, from lr / (warm-up steps) at the first step."""
    decay_fraction: Share | None = None
    """With wsd: share of all steps, the last ones, over which the learning rate decays. null: 0.2."""
    rewarm_steps: NonNegativeInt = 0
    """A run that is continued with another schedule (data.max_steps raised, another lr) moves linearly from its earlier learning rate to
    the new schedule's over this many steps. 0: at once. The log has both rates."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's β1 and β2."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this. 0: no clipping."""
    distributed: bool = True
    """Megatron's distributed optimizer: shard optimizer states over data-parallel ranks."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients during the backward pass. null: on GPUs with data or context parallelism."""
    overlap_param_gather: bool | None = None
    """Gather parameters during the forward pass. Needs distributed and overlap_grad_reduce. null: where both are."""

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed: true and overlap_grad_reduce: true")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}. Lower min_lr")
        if self.decay_fraction is not None and self.schedule != "wsd":
            raise ValueError(f"decay_fraction needs schedule: wsd; it is {self.schedule}")
        if self.decay_fraction is not None and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction:g} and decay_fraction {self.decay_fraction:g} exceed 1 together. "
                "Lower one of them"
            )
        return self

    def resolved(self, *, overlap: bool) -> Optimizer:
        """With true or false for the overlaps that are null; overlap: whether there is anything to gain."""
        reduce = overlap if self.overlap_grad_reduce is None else self.overlap_grad_reduce
        gather = (
            reduce and overlap and self.distributed if self.overlap_param_gather is None else self.overlap_param_gather
        )
        return self.model_copy(update={"overlap_grad_reduce": reduce, "overlap_param_gather": gather})


class Checkpoint(Section):
    """When to save, what to keep, and how to continue."""

    every: NonNegativeInt = 100
    """Steps between saves. 0: save only at the end."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep the checkpoints of steps that are multiples of this. 0: none."""
    asynchronous: bool = False
    """Write in a forked process while training continues."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest intact checkpoint in run.dir. never: refuse to start if there is one."""
    retry_after: PositiveInt = 10
    """Steps after which a failed save is tried again."""
    max_failures: PositiveInt = 5
    """End the run after this many failed saves in a row."""
    best: Best | None = None


class Export(Section):
    """Hugging Face directories written during training, to run.dir/hf/step-…. `iwsft export` converts checkpoints afterwards."""

    every: NonNegativeInt = 0
    """Steps between exports. 0: none."""
    at_end: bool = False
    """Export after the last step."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the exported tensors. null: precision.dtype."""


class Wandb(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "disabled"
    """offline: log to the run directory, for `wandb sync`. online: send metrics during the run."""
    project: str = "iwsft"
    """Project name."""
    entity: str | None = None
    """User or team. null: the environment's WANDB_ENTITY, or the default of the account."""
    group: str | None = None
    """Runs to be shown together. null: the environment's WANDB_RUN_GROUP, or none."""
    tags: list[str] = []
    """Labels to filter runs by."""
    notes: str | None = None
    """A description of the run. null: the environment's WANDB_NOTES, or none."""
    artifacts: bool = False
    """After the last step, log the newest checkpoint as an artifact that refers to its directory; nothing is uploaded."""


class Logging(Section):
    """Metrics and warnings."""

    every: PositiveInt = 1
    """Steps between lines of progress in the log, which show means over the steps between. metrics.jsonl has every step."""
    console: Literal["auto", "plain", "live"] = "auto"
    """plain: lines. live: a table that is redrawn after each step. auto: live in a terminal, plain in a pipe and under Slurm."""
    warn_ess_below: Share = 0.1
    """Warn when the effective sample size, as a share of the batch, falls below this."""
    warn_clipped_above: Share = 0.5
    """Warn when more than this share of the weights is clipped."""
    wandb: Wandb = Wandb()
    tensorboard: bool = False
    """Write TensorBoard event files to the run directory."""
    callbacks: list[str] = []
    """Your own callbacks, as path/to/file.py:function. Each is called with a step's result (a `StepResult`): after every step on the main
    rank, unless its attributes `every`, `at_end` and `collective` say otherwise. A dict that it returns is added to the metrics."""


class Config(Section):
    """A training run."""

    run: Run
    model: Model
    data: Data
    objective: Objective = Objective()
    reference: Reference = Reference()
    adapter: Adapter = Adapter()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    megatron: Megatron = Megatron()

    @model_validator(mode="after")
    def _chosen_metrics_exist(self) -> Config:
        for key, choice in self.metric_choices.items():
            problem = metric_problem(choice, self.evaluation, self.objective.name)
            if problem:
                raise ValueError(f"{key}: {problem}")
        return self

    @model_validator(mode="after")
    def _answers_come_from_a_model(self) -> Config:
        if self.evaluation.answers.wanted and self.adapter.rank:
            raise ValueError(
                "evaluation.answers needs all weights of the policy, but with adapter.rank only adapters are exported. Use evaluation.sets"
            )
        return self

    @property
    def metric_choices(self) -> dict[str, MetricChoice]:
        """Key → the choice there, of all that decide something by a metric."""
        choices = {"checkpoint.best": self.checkpoint.best, "run.stop_early": self.run.stop_early}
        return {key: choice for key, choice in choices.items() if choice is not None}

    @model_validator(mode="after")
    def _rows_fit_the_overlaps_buffers(self) -> Config:
        if self.parallel.overlap_tensor and self.data.packing != "best_fit":
            raise ValueError("parallel.overlap_tensor needs data.packing: best_fit, whose rows are all of one length")
        recipe = self.precision.fp8
        if self.parallel.overlap_tensor and recipe is not None and FP8_RECIPES[recipe].overlapped is None:
            raise ValueError(
                f"parallel.overlap_tensor does not go with precision.fp8 {recipe}, which Transformer Engine's userbuffers do not support. "
                "Set overlap_tensor to false, or use fp8: tensorwise"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_weights_leave_the_gpu(self) -> Config:
        precision = self.precision
        if self.reference.offload and precision.fp8 is not None and not precision.fp8_emulation:
            raise ValueError(
                f"reference.offload does not go with precision.fp8 {precision.fp8}: Transformer Engine keeps the FP8 copies of all weights "
                "on the GPU. Set offload to false, or use reference.source: cached"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_adapters(self) -> Config:
        reference = self.reference
        if reference.source == "base":
            if not self.adapter.rank:
                raise ValueError(
                    "reference.source base is the model without its adapters, but adapter.rank is 0. Set it, or use cached or live"
                )
            if self.precision.fp8 == "delayed":
                raise ValueError(
                    "reference.source base does not go with precision.fp8 delayed, whose scales would follow two passes at once. "
                    "Use fp8: tensorwise, or reference.source: live"
                )
        if self.adapter.rank and reference.refresh:
            raise ValueError(
                "reference.refresh copies all weights, of which adapters train none. Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _fp8_parameters_are_gathered(self) -> Config:
        if self.precision.fp8_parameters and not self.optimizer.distributed:
            raise ValueError("precision.fp8_parameters needs optimizer.distributed: true")
        return self

    @model_validator(mode="after")
    def _profile_is_within_the_run(self) -> Config:
        steps, end = self.run.profile.steps, self.data.max_steps
        if steps is not None and end is not None and steps[1] > end:
            raise ValueError(
                f"run.profile.steps ends at step {steps[1]}, but the run ends at step {end} "
                "(data.max_steps); lower it, or raise data.max_steps"
            )
        return self

    def layout(self, world_size: int) -> ParallelLayout:
        """The parallel layout of `world_size` processes. Raises ConfigError if degrees, batch sizes and world do not fit together."""
        layout = ParallelLayout.for_world(world_size, **self.parallel.degrees())
        layout.micro_batches(global_batch_size=self.data.global_batch_size, micro_batch_size=self.data.micro_batch_size)
        return layout

    @property
    def packed_multiple(self) -> int:
        """Tokens to a multiple of which each trajectory counts as padded when it is packed."""
        if self.data.packing == "none":
            return 1
        return self.data.pad_to or (2 * self.parallel.context if self.parallel.context > 1 else 1)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
