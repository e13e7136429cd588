"""What a model costs under a parallel layout: memory per GPU, and the pipeline's idle share. Pure arithmetic.

Memory counts what Megatron-Core keeps: bf16 parameters, float32 gradients, and the distributed optimizer's float32 master
weights and two moments split over data- and context-parallel ranks. Activations follow Korthikanti et al. 2022
(arXiv 2205.05198, section 4), recounted tensor by tensor for SwiGLU, grouped-query attention, flash attention and no dropout; the
number of micro-batches in flight and the pipeline bubble follow Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.hf.adapters import AdapterSettings, projections
from megatron_iwsft.hf.architecture import Architecture

_BF16, _FP32 = 2, 4
DTYPE_BYTES = {"bf16": _BF16, "fp32": _FP32}
# Per parameter: two moments, and of a bf16 parameter its float32 master weight.
OPTIMIZER_BYTES = {"bf16": 3 * _FP32, "fp32": 2 * _FP32}


@dataclass(frozen=True)
class Cost:
    """Bytes on the fullest rank, and the share of a step that the pipeline idles."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    bubble: float

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def cost(
    arch: Architecture,
    layout: ParallelLayout,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int,
    recompute: str = "none",
    local: bool = False,
    dtype: Literal["bf16", "fp32"] = "bf16",
    distributed: bool = True,
    adapters: AdapterSettings | None = None,
) -> Cost:
    """Cost of training, by default in bf16 with the distributed optimizer. seq_length in tokens; micro_batches per step and pipeline.

    adapters: trained in place of the weights, which then have neither gradients nor optimizer states. A layer keeps what it keeps without
    adapters, and their A·x: a little less if it is no target.
    local: for the local backend, whose context-parallel ranks keep the keys and values of the whole sequence.
    The log-prob operator's chunk of logits and the trained rows it saves are left out: they do not grow with the layout.
    """
    # The first stage holds most activations, and the first or the last most parameters.
    dense, expert = max(stage_parameters(arch, layout), key=sum)
    added = (0, 0) if adapters is None else adapter_parameters(arch, layout, adapters)
    trained = (dense, expert) if adapters is None else added
    replicas = layout.context * layout.data
    optimizer = sum(trained)
    if distributed:
        optimizer = trained[0] // replicas + trained[1] // (layout.tensor * replicas // layout.expert)
    size = DTYPE_BYTES[dtype]
    tokens = seq_length * micro_batch_size // layout.context
    layers = max(_layers(arch, layout)) * layout.chunks_per_stage
    in_flight = float(min(layout.pipeline, micro_batches))
    if layout.chunks_per_stage > 1:
        in_flight = min(
            micro_batches, layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks_per_stage))
        )
    per_layer = (_activation_bytes(arch, layout, local=local) + _adapter_bytes(arch, layout, adapters)) * size // _BF16
    if recompute == "full":
        kept = size * arch.hidden_size // (layout.tensor if layout.sequence else 1)
        activations = tokens * (kept * layers * in_flight + per_layer)
    else:
        activations = tokens * per_layer * layers * in_flight
    return Cost(
        parameters=size * (dense + expert + sum(added)),
        gradients=_FP32 * sum(trained),
        optimizer=OPTIMIZER_BYTES[dtype] * optimizer,
        activations=int(activations),
        bubble=(layout.pipeline - 1) / (layout.chunks_per_stage * micro_batches + layout.pipeline - 1),
    )


def num_parameters(arch: Architecture) -> int:
    """Of the whole model, with a vocabulary padded as on one rank."""
    return sum(stage_parameters(arch, ParallelLayout())[0])


def _layers(arch: Architecture, layout: ParallelLayout) -> list[int]:
    """Layers of each virtual stage."""
    return list(layout.layers_per_stage or [arch.num_layers // layout.stages] * layout.stages)


def stage_parameters(arch: Architecture, layout: ParallelLayout) -> list[tuple[int, int]]:
    """(dense, experts') parameters on one rank of each pipeline stage."""
    query, kv, h = arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim, arch.hidden_size
    split = h * (query + 2 * kv) + query * h + (query + 2 * kv if arch.qkv_bias else 0)
    replicated = (4 if arch.post_norms else 2) * h + (2 * arch.head_dim if arch.qk_norm else 0)
    per_expert = 0
    if arch.experts is None:
        split += 3 * h * arch.ffn_size
    else:
        replicated += h * arch.experts.count  # the router
        per_expert = 3 * h * arch.experts.ffn_size * arch.experts.count // layout.expert
    dense, experts = [0] * layout.pipeline, [0] * layout.pipeline
    for stage, layers in enumerate(_layers(arch, layout)):
        dense[stage % layout.pipeline] += layers * (split // layout.tensor + replicated)
        experts[stage % layout.pipeline] += layers * per_expert
    vocabulary = arch.padded_vocab(layout.tensor) // layout.tensor * h
    dense[0] += vocabulary
    dense[-1] += h
    if not arch.tied or layout.pipeline > 1:  # a tied output layer on another stage is a copy
        dense[-1] += vocabulary
    return list(zip(dense, experts, strict=True))


def adapter_parameters(arch: Architecture, layout: ParallelLayout, settings: AdapterSettings) -> tuple[int, int]:
    """(dense, experts') parameters of adapters on one rank of the stage with the most layers."""
    dense = experts = 0
    for target in settings.targets:
        for out, columns in projections(arch, target).values():
            if target == "experts" and arch.experts:
                experts += (out + columns) * arch.experts.count // layout.expert
            elif target in ("proj", "fc2"):  # row-parallel: B is replicated
                dense += out + columns // layout.tensor
            else:
                dense += columns + out // layout.tensor
    layers = max(sum(_layers(arch, layout)[stage :: layout.pipeline]) for stage in range(layout.pipeline))
    return layers * settings.rank * dense, layers * settings.rank * experts


def _adapter_bytes(arch: Architecture, layout: ParallelLayout, settings: AdapterSettings | None) -> int:
    """Bytes of A·x that one layer's adapters keep per token of this rank, in bf16: all of them of column-parallel layers."""
    if settings is None:
        return 0
    chosen = arch.experts.per_token if arch.experts else 1
    split = layout.tensor if layout.sequence else 1
    share = {"qkv": 1.0, "fc1": 1.0, "proj": 1 / split, "fc2": 1 / split, "experts": chosen / layout.tensor}
    return int(_BF16 * settings.rank * sum(share[t] * len(projections(arch, t)) for t in settings.targets))


def local_mask_bytes(arch: Architecture, layout: ParallelLayout, longest: int) -> int:
    """Bytes of the largest attention mask that the local backend makes for a trajectory of `longest` tokens (padded).

    Its masks are dense, one byte per (query, key): of a context-parallel rank's chunk of queries, or of a window. Causal attention to a
    trajectory that one rank holds completely needs none.
    """
    if layout.context > 1:
        return longest // (2 * layout.context) * longest
    windows = [window for window in arch.windows if window is not None and window < longest]
    return longest**2 if windows else 0


def _activation_bytes(arch: Architecture, layout: ParallelLayout, *, local: bool) -> int:
    """Bytes that one layer of Transformer Engine keeps for backward, per token of this rank, in bf16.

    tests/model/test_memory.py counts them on the real layer. Experts: as if their load were balanced.
    local: and the gathered keys and values of the local backend's context parallelism.
    """
    query, kv, heads = arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim, arch.num_heads + arch.num_groups
    # Inputs of both norms, of the QKV and of the first feed-forward projection (or the router); the norms' scales. Inputs of the norms
    # after attention and feed-forward.
    norms = 4 if arch.post_norms else 2
    replicated = _BF16 * (2 + norms) * arch.hidden_size + _FP32 * norms
    # Output of the QKV projection, of which the value is a part; rotated query and key; attention's output and its log-sum-exp.
    split = _BF16 * 3 * (query + kv) + _FP32 * arch.num_heads
    if arch.qk_norm:  # contiguous copies of what is normalised, and its scales
        split += _BF16 * (query + kv) + _FP32 * heads
    if local:
        split += _BF16 * 2 * (layout.context - 1) * kv
    if arch.experts is None:
        # Gate, up, and what goes into the second projection; if the activation is not fused, its output and a copy of up too.
        split += _BF16 * (3 if arch.activation == "silu" else 5) * arch.ffn_size
    else:  # the same for every chosen expert, and its copy of the token
        split += _BF16 * arch.experts.per_token * (3 * arch.experts.ffn_size + arch.hidden_size)
    return replicated // (layout.tensor if layout.sequence else 1) + split // layout.tensor
