"""Parallel layouts of a model: which are valid, and what each costs per GPU. Pure arithmetic.

Memory counts what Megatron-Core keeps: bf16 parameters, float32 gradients, and the distributed optimizer's float32 master
weights and two moments split over data- and context-parallel ranks. Activations follow Korthikanti et al. 2022
(arXiv 2205.05198, section 4), recounted tensor by tensor for SwiGLU, grouped-query attention, flash attention and no dropout; the
number of micro-batches in flight and the pipeline bubble follow Narayanan et al. 2021 (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_iwsft.hf.architecture import Architecture

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Layout:
    """Parallel degrees. layers_per_stage: layers of each (virtual) stage in order; None splits evenly."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    layers_per_stage: tuple[int, ...] | None = None
    expert: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual

    def describe(self) -> str:
        text = f"TP {self.tensor} PP {self.pipeline} CP {self.context} DP {self.data}"
        text += (f" VP {self.virtual}" if self.virtual > 1 else "") + (" SP" if self.sequence else "")
        text += f" EP {self.expert}" if self.expert > 1 else ""
        return text


def broken_rule(arch: Architecture, layout: Layout) -> str | None:
    """Why a layout cannot hold this model, in one sentence that names the rule; None if it can."""
    if layout.layers_per_stage is not None:
        if len(layout.layers_per_stage) != layout.stages:
            return (
                f"layers_per_stage names {len(layout.layers_per_stage)} stages, but pipeline {layout.pipeline} × "
                f"virtual_pipeline {layout.virtual} makes {layout.stages}"
            )
        if sum(layout.layers_per_stage) != arch.num_layers:
            return f"layers_per_stage adds up to {sum(layout.layers_per_stage)} layers; the model has {arch.num_layers}"
    elif arch.num_layers % layout.stages:
        return (
            f"{arch.num_layers} layers do not divide into {layout.stages} pipeline stages (pipeline {layout.pipeline} × "
            f"virtual_pipeline {layout.virtual}); name an uneven split with layers_per_stage"
        )
    columns = arch.ffn_size if arch.experts is None else layout.tensor  # tensor parallelism does not cut experts
    for name, size in (("attention heads", arch.num_heads), ("feed-forward columns", columns)):
        if size % layout.tensor:
            return f"tensor {layout.tensor} does not divide the model's {size} {name}"
    if arch.num_groups % layout.tensor and layout.tensor % arch.num_groups:
        return f"tensor {layout.tensor} and the model's {arch.num_groups} key-value heads: one must divide the other"
    if layout.sequence and layout.tensor == 1:
        return "sequence parallelism needs tensor ≥ 2"
    return _broken_expert_rule(arch, layout)


def _broken_expert_rule(arch: Architecture, layout: Layout) -> str | None:
    if arch.experts is None:
        return f"expert {layout.expert}, but the {arch.family} family has no experts" if layout.expert > 1 else None
    if arch.experts.count % layout.expert:
        return f"expert {layout.expert} does not divide the model's {arch.experts.count} experts"
    stage = layout.world_size // layout.pipeline
    if stage % layout.expert:
        return f"expert {layout.expert} does not divide the {stage} ranks of a pipeline stage"
    if layout.tensor > 1 and not layout.sequence:
        return "a mixture of experts with tensor ≥ 2 needs sequence parallelism: each rank routes its own tokens"
    return None


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
    layout: Layout,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int,
    recompute: str = "none",
) -> Cost:
    """Cost of training in bf16 with the distributed optimizer. seq_length in tokens; micro_batches per step and pipeline.

    The log-prob operator's chunk of logits and the trained rows it saves are left out: they do not grow with the layout.
    """
    # The first stage holds most activations, and the first or the last most parameters.
    dense, expert = max(stage_parameters(arch, layout), key=sum)
    replicas = layout.context * layout.data
    optimizer = dense // replicas + expert // (layout.tensor * replicas // layout.expert)
    tokens = seq_length * micro_batch_size // layout.context
    layers = max(_layers(arch, layout)) * layout.virtual
    in_flight = float(min(layout.pipeline, micro_batches))
    if layout.virtual > 1:
        in_flight = min(
            micro_batches, layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual))
        )
    per_layer = _activation_bytes(arch, layout)
    if recompute == "full":
        kept = _BF16 * arch.hidden_size // (layout.tensor if layout.sequence else 1)
        activations = tokens * (kept * layers * in_flight + per_layer)
    else:
        activations = tokens * per_layer * layers * in_flight
    return Cost(
        parameters=_BF16 * (dense + expert),
        gradients=_FP32 * (dense + expert),
        optimizer=3 * _FP32 * optimizer,
        activations=int(activations),
        bubble=(layout.pipeline - 1) / (layout.virtual * micro_batches + layout.pipeline - 1),
    )


def _layers(arch: Architecture, layout: Layout) -> list[int]:
    """Layers of each virtual stage."""
    return list(layout.layers_per_stage or [arch.num_layers // layout.stages] * layout.stages)


def stage_parameters(arch: Architecture, layout: Layout) -> list[tuple[int, int]]:
    """(dense, experts') parameters on one rank of each pipeline stage."""
    query, kv, h = arch.num_heads * arch.head_dim, arch.num_groups * arch.head_dim, arch.hidden_size
    cut = h * (query + 2 * kv) + query * h + (query + 2 * kv if arch.qkv_bias else 0)
    whole = 2 * h + (2 * arch.head_dim if arch.qk_norm else 0)
    per_expert = 0
    if arch.experts is None:
        cut += 3 * h * arch.ffn_size
    else:
        whole += h * arch.experts.count  # the router
        per_expert = 3 * h * arch.experts.ffn_size * arch.experts.count // layout.expert
    dense, experts = [0] * layout.pipeline, [0] * layout.pipeline
    for stage, layers in enumerate(_layers(arch, layout)):
        dense[stage % layout.pipeline] += layers * (cut // layout.tensor + whole)
        experts[stage % layout.pipeline] += layers * per_expert
    vocabulary = arch.padded_vocab(layout.tensor) // layout.tensor * h
    dense[0] += vocabulary
    dense[-1] += h
    if not arch.tied or layout.pipeline > 1:  # a tied output layer on another stage is a copy
        dense[-1] += vocabulary
    return list(zip(dense, experts, strict=True))


def _activation_bytes(arch: Architecture, layout: Layout) -> int:
    """Bytes that one layer keeps for backward, per token of this rank, in bf16. Experts: as if their load were balanced."""
    whole = 4 * arch.hidden_size  # inputs of both norms, of the QKV and of the first feed-forward projection
    attention = 2 * (arch.num_heads + arch.num_groups) * arch.head_dim  # query, key, value, attention's output
    feed_forward = 3 * arch.ffn_size  # gate, up, their product
    if arch.experts is not None:  # and the tokens' copies before and after their experts
        feed_forward = arch.experts.per_token * (3 * arch.experts.ffn_size + 2 * arch.hidden_size)
    split = attention + feed_forward
    return _BF16 * (whole // (layout.tensor if layout.sequence else 1) + split // layout.tensor)


def valid_layouts(arch: Architecture, gpus: int, *, gpus_per_node: int = 8, max_virtual: int = 4) -> Iterator[Layout]:
    """Every valid layout of `gpus` with tensor parallelism inside a node, sequence parallelism wherever there is tensor."""
    for tensor in _divisors(min(gpus, gpus_per_node)):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // (tensor * pipeline)):
                for virtual in range(1, max_virtual + 1 if pipeline > 1 else 2):
                    data = gpus // (tensor * pipeline * context)
                    for expert in _divisors(gpus // pipeline) if arch.experts else [1]:
                        layout = Layout(tensor, pipeline, virtual, context, data, sequence=tensor > 1, expert=expert)
                        if broken_rule(arch, layout) is None:
                            yield layout


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
