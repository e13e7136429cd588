"""The `megatron` section of a config: settings that go through to Megatron-Core unchanged, and those that must not. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from megatron_iwsft.config.section import PositiveInt, Section

_OURS = "use {} instead"
_SHAPES = "rows have other segments in every micro-batch, and a graph would repeat those of the first"
_STATES = "it moves the optimizer's states to where this program's checkpoints do not find them"

# Settings of Megatron-Core that would be set here, but are refused: name → why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope"), _SHAPES),
    **dict.fromkeys(("use_precision_aware_optimizer", "optimizer_cpu_offload", "optimizer_offload_fraction"), _STATES),
    **dict.fromkeys(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
        "its loss depends on packing and on the parallel layout; use objective.router_balance instead",
    ),
    **dict.fromkeys(
        ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
        "dropped tokens would make the loss depend on the parallel layout",
    ),
    "tp_only_amax_red": "scales of precision.fp8 delayed, and so the loss, would depend on the parallel layout",
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"), "policy and reference would differ at the start, and weights not be 1"
    ),
    **dict.fromkeys(
        ("grad_reduce_in_fp32", "accumulate_allreduce_grads_in_fp32"), "gradients are always summed in float32"
    ),
    **dict.fromkeys(("average_in_collective", "calculate_per_token_loss"), "the loss has one global denominator: objective.normalize"),
    **dict.fromkeys(("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"), "log-probs come from this program's own operator"),
    **{name: _OURS.format(f"parallel.{ours}") for name, ours in (
        ("tensor_model_parallel_size", "tensor"),
        ("pipeline_model_parallel_size", "pipeline"),
        ("context_parallel_size", "context"),
        ("expert_model_parallel_size", "expert"),
        ("sequence_parallel", "sequence"),
        ("cp_comm_type", "context_communication"),
        ("recompute_granularity", "recompute"),
        ("recompute_modules", "recompute"),
        ("recompute_num_layers", "recompute_layers"),
    )},
    **{name: _OURS.format(f"precision.{ours}") for name, ours in (
        ("bf16", "dtype"),
        ("fp8", "fp8"),
        ("fp8_recipe", "fp8"),
        ("fp8_param", "fp8_parameters"),
        ("fp8_amax_history_len", "fp8_amax_history_len"),
        ("fp8_amax_compute_algo", "fp8_amax_compute_algo"),
    )},
    **{name: _OURS.format(f"optimizer.{name}") for name in ("overlap_grad_reduce", "overlap_param_gather", "clip_grad")},
}  # fmt: skip


class Megatron(Section):
    """Settings of Megatron-Core that change speed and memory, but not what is computed. null: the installed version's own default."""

    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] | None = None
    """How tokens get to their experts. null: alltoall."""
    moe_flex_dispatcher_backend: Literal["deepep", "hybridep"] | None = None
    """The library behind the flex dispatcher."""
    moe_permute_fusion: bool | None = None
    """Sort tokens by expert in one kernel of Transformer Engine."""
    moe_router_fusion: bool | None = None
    """Choose experts in one kernel of Transformer Engine."""
    fine_grained_activation_offloading: bool | None = None
    """Keep the activations of `offload_modules` in host memory between forward and backward."""
    offload_modules: list[str] | None = None
    """For fine_grained_activation_offloading, such as [core_attn, attn_proj]."""
    bucket_size: PositiveInt | None = None
    """Elements of a bucket of gradients, which are reduced together."""
    pad_buckets_for_high_nccl_busbw: bool | None = None
    """Make the sizes of buckets multiples of a large power of two, for NCCL on many ranks."""
    nccl_ub: bool | None = None
    """Register buffers of parameters and gradients with NCCL."""
    deterministic_mode: bool | None = None
    """Refuse kernels whose results vary between runs; also needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in REFUSED:
                raise ValueError(f"{name} cannot be set here: {REFUSED[name]}. Remove it")
        return values

    def given(self) -> dict[str, Any]:
        """The settings that are not null."""
        return self.model_dump(exclude_none=True)
