"""Megatron-Core's GPTModel for an architecture and a parallel layout, returning log-probs instead of a loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from megatron_iwsft.data.batch import Batch
from megatron_iwsft.distributed.capabilities import has_gradient_accumulation_fusion
from megatron_iwsft.distributed.context import ParallelContext, Platform
from megatron_iwsft.distributed.fp8_recipes import FP8_RECIPES, FP8Recipe
from megatron_iwsft.distributed.mcore_compat import checked, mlp_submodules
from megatron_iwsft.distributed.parallel_layout import ParallelLayout
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.model.adapters import Adapters
from megatron_iwsft.model.fp8_emulation import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
    Fp8Rounding,
    emulate_fp8,
)
from megatron_iwsft.model.layers import RotaryLayer, inverse_frequencies, normed_residual, rope_columns
from megatron_iwsft.model.moe import Balance, BalancedRouter, ExpertLayer, PackedRow
from megatron_iwsft.model.packed_attention import PackedAttention
from megatron_iwsft.model.parameters import ATTENTION_NORM, is_adapter, is_expert
from megatron_iwsft.ops.logprob import vocab_parallel_logprob

ContextCommunication = Literal["p2p", "all_gather", "a2a"]


@dataclass(frozen=True)
class ModelSettings:
    """How a model computes, apart from its parallel layout.

    dtype       of parameters and activations
    recompute, recompute_layers, overlap_tensor, context_communication  see `config.Parallel`
    backend     Megatron-Core's local layers in plain torch, or Transformer Engine's
    fp8, fp8_parameters, fp8_emulation, amax_history, amax_algorithm  see `config.Precision`
    bf16_edges  layers at the start and at the end that stay out of FP8
    megatron    settings that are passed on to `TransformerConfig`, by its names
    """

    dtype: torch.dtype = torch.float32
    recompute: Literal["none", "selective", "full"] | tuple[str, ...] = "none"
    recompute_layers: int | None = None
    overlap_tensor: bool = False
    backend: Literal["local", "transformer_engine"] = "local"
    context_communication: ContextCommunication | None = None
    fp8: FP8Recipe | None = None
    fp8_parameters: bool = False
    amax_history: int | None = None
    amax_algorithm: Literal["max", "most_recent"] | None = None
    fp8_emulation: bool = False
    bf16_edges: tuple[int, int] = (0, 0)
    megatron: Mapping[str, Any] = field(default_factory=dict)


_ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": functools.partial(gelu, approximate="tanh")}


class LocalRMSNorm(torch.nn.Module):
    """RMSNorm of the local backend. Marks its weight for the gradient all-reduce that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - an attribute of Megatron-Core's
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:  # in float32: 1 + weight has fewer digits than the weight
            return rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight.float(), self.eps).to(x.dtype)
        return rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class _HiddenStates(ColumnParallelLinear):
    """An output layer that owns the projection's weight but hands the hidden states through: the loss projects them itself."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        return input_, None


class PolicyModel(GPTModel):
    """GPTModel that returns the log-prob of each label, from `ops.logprob`, where Megatron-Core's returns its loss.

    adapters: its low-rank adapters, None unless `add_adapters` has added some.
    """

    adapters: Adapters | None = None

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture

    def trained_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) of what training changes and checkpoints hold: the adapters if there are any, else everything."""
        return ((n, p) for n, p in self.named_parameters() if self.adapters is None or is_adapter(n))

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron-Core's, of `trained_parameters`."""
        return super().sharded_state_dict(*args, **kwargs) if self.adapters is None else self.adapters.sharded_state()

    def setup_embeddings_and_output_layer(self) -> None:
        # GPTModel's constructor calls this between making the output layer and tying it to the embedding.
        if self.post_process:
            self.output_layer = _HiddenStates(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: None,
        trained: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """GPTModel's, with scaled embeddings where the architecture has them. trained: see `Batch`; of the labels."""
        self._trained = trained
        scale = self.architecture.embedding_scale
        if self.pre_process and scale != 1.0:
            embeddings = self.embedding(input_ids=input_ids, position_ids=position_ids)
            rounded = torch.tensor(scale, dtype=embeddings.dtype)  # as in transformers
            kwargs["decoder_input"] = embeddings * rounded
        return super().forward(input_ids, position_ids, attention_mask, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [1, T], logits: the hidden states [T (/tp), 1, H] → log-probs float32 [1, T], 0 where IGNORE."""
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        logprobs = vocab_parallel_logprob(
            logits.squeeze(1),
            weight,
            labels.flatten(),
            group=self.pg_collection.tp,
            vocab_size=self.architecture.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            trained=self._trained,
        )
        return logprobs.unsqueeze(0)


def forward(model: torch.nn.Module, batch: Batch, balance: Balance | None = None) -> Tensor:
    """Run one stage on a micro-batch: hidden states [T (/tp), 1, H], or on the last stage log-probs [1, T].

    balance: of a mixture of experts whose routers are trained to spread the load, else None.
    """
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        balance=balance,
    )
    return model(
        batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=packed, trained=batch.trained
    )


def build_model(
    arch: Architecture, parallel: ParallelContext, platform: Platform, settings: ModelSettings
) -> list[PolicyModel]:
    """This rank's model chunks (one, or one per virtual stage), with uninitialised parameters: see `load_weights`."""
    layout = parallel.layout
    broken = layout.broken_rule(arch)
    if broken:
        raise ConfigError(f"parallel: {broken}.")
    if settings.fp8_emulation and arch.experts is not None:
        raise ConfigError(
            f"precision.fp8_emulation covers dense models; the {arch.family} family has experts. Set it to false."
        )
    config = _transformer_config(arch, layout, platform, settings)
    chunks = []
    for stage in range(layout.chunks_per_stage):
        vp_stage = stage if layout.virtual_pipeline else None
        model = PolicyModel(
            arch,
            config=config,
            transformer_layer_spec=_block_spec(arch, config, settings, vp_stage),
            vocab_size=arch.padded_vocab(layout.tensor),
            max_sequence_length=arch.max_positions,
            pre_process=parallel.is_first_stage and stage == 0,
            post_process=parallel.is_last_stage and stage == layout.chunks_per_stage - 1,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        model.rotary_pos_emb.inv_freq = inverse_frequencies(arch).to(platform.device)
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                # Transformer Engine's layers add weight gradients to `main_grad` in the matmul. They need no apex for it, but the
                # setting that would say so to them makes Megatron-Core's own output layer ask for apex.
                module.fuse_wgrad_accumulation = True
        for name, parameter in model.named_parameters():
            if is_expert(name):
                # With TP, expert gradients are reduced over a different group than dense ones, even at EP 1. Megatron-Core
                # marks them only at EP ≥ 2.
                parameter.allreduce = False
        if settings.fp8 is not None and settings.fp8_emulation:
            first, last = settings.bf16_edges
            delayed: dict[str, Any] = dict(history=settings.amax_history, algorithm=settings.amax_algorithm)
            rounding = functools.partial(Fp8Rounding, settings.fp8, **delayed)
            emulate_fp8(model, rounding, layers=arch.num_layers, bf16_first_layers=first, bf16_last_layers=last)
        chunks.append(model.to(platform.device))
    return chunks


def _transformer_config(
    arch: Architecture, layout: ParallelLayout, platform: Platform, settings: ModelSettings
) -> TransformerConfig:
    window = next((w for w in arch.windows if w is not None), None)
    return checked(
        TransformerConfig,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_groups,
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[arch.activation],
        layernorm_zero_centered_gamma=arch.zero_centered_norms,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        # Queries and keys scaled alike after rotation: the product, by the square.
        softmax_scale=arch.distinct_ropes[0].attention_factor ** 2 * arch.attention_scale,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [int(w is not None) for w in arch.windows],
        **_expert_settings(arch, settings),
        **_fp8_settings(settings),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        cp_comm_type=_context_communication(arch, layout, settings),
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sequence,
        tp_comm_overlap=settings.overlap_tensor,
        params_dtype=settings.dtype,
        pipeline_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16,
        # With two stages a stage's neighbours before and behind are one rank: interleaved messages sent in one batch would
        # be taken for each other. Sent one by one they travel over two groups.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        calculate_per_token_loss=True,  # sums in the loss, one global denominator: see step.py
        # Every parameter is loaded. Initialisation must still run: it marks the tensor-parallel parameters, without which the
        # gradient norm leaves out all but the first rank's.
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=has_gradient_accumulation_fusion(platform.device),
        # Megatron-Core has it for SwiGLU, where it keeps 3 × ffn_size per token for backward instead of 5; see memory.py.
        bias_activation_fusion=arch.activation == "silu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=settings.backend == "transformer_engine",  # the other way waits for the GPU in every layer
        **_recompute_settings(settings),
        pipeline_model_parallel_layout=_pipeline_layout(layout.layers_per_stage),
        more=settings.megatron,
    )


def _context_communication(
    arch: Architecture, layout: ParallelLayout, settings: ModelSettings
) -> ContextCommunication | None:
    """How Transformer Engine's attention exchanges keys and values; None without context parallelism, and for the local backend.

    Raises ConfigError for what it cannot compute: sliding windows in a ring, or heads that do not divide.
    """
    if layout.context == 1 or settings.backend == "local":
        return None
    asked = settings.context_communication
    windowed = any(window is not None for window in arch.windows)
    chosen = asked or ("a2a" if windowed else "p2p")
    if windowed and chosen == "p2p":
        raise ConfigError(
            "parallel.context_communication p2p does not support the model's sliding windows. Use a2a or all_gather, or context: 1."
        )
    for name, total in (("attention heads", arch.num_heads), ("key-value heads", arch.num_groups)):
        heads = max(1, total // layout.tensor)
        if chosen == "a2a" and heads % layout.context:
            why = "" if asked else ", which the model's sliding windows need unless all_gather is chosen"
            raise ConfigError(
                f"parallel.context_communication a2a{why}: context {layout.context} does not divide a tensor-parallel rank's {heads} "
                f"{name}. Use all_gather, or change the degrees."
            )
    return chosen


def _expert_settings(arch: Architecture, settings: ModelSettings) -> dict[str, Any]:
    if arch.experts is None:
        return {}
    return dict(
        num_moe_experts=arch.experts.count,
        moe_router_topk=arch.experts.per_token,
        moe_ffn_hidden_size=arch.experts.ffn_size,
        # Softmax over the chosen experts' logits equals softmax over all, rescaled to add up to 1.
        moe_router_pre_softmax=not arch.experts.normalize,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # ours: see moe.py
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=settings.backend == "transformer_engine",
    )


def _recompute_settings(settings: ModelSettings) -> dict[str, Any]:
    if settings.recompute == "none":
        return {}
    if settings.recompute != "full":
        modules = ["core_attn"] if settings.recompute == "selective" else list(settings.recompute)
        if "layernorm" in modules and settings.backend == "local":
            raise ConfigError("parallel.recompute: layernorm needs Transformer Engine's layers. Leave it out.")
        return dict(recompute_granularity="selective", recompute_modules=modules)
    if settings.recompute_layers is not None:
        return dict(
            recompute_granularity="full", recompute_method="block", recompute_num_layers=settings.recompute_layers
        )
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _fp8_settings(settings: ModelSettings) -> dict[str, Any]:
    if settings.fp8 is None or settings.fp8_emulation:
        return {}
    first, last = settings.bf16_edges
    return dict(
        fp8=FP8_RECIPES[settings.fp8].format,
        fp8_recipe=settings.fp8,
        fp8_param=settings.fp8_parameters,
        # Transformer Engine's own defaults; Megatron-Core's are a history of one step.
        fp8_amax_history_len=settings.amax_history or 1024,
        fp8_amax_compute_algo=settings.amax_algorithm or "max",
        first_last_layers_bf16=bool(first or last),
        num_layers_at_start_in_bf16=first,
        num_layers_at_end_in_bf16=last,
    )


def _pipeline_layout(layers_per_stage: tuple[int, ...] | None) -> list[list[str]] | None:
    """An uneven split in Megatron-Core's terms: what each (virtual) stage holds, in order."""
    if layers_per_stage is None:
        return None
    stages = [["decoder"] * layers for layers in layers_per_stage]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _leave_as_it_is(weight: Tensor) -> Tensor:
    return weight


def _block_spec(
    arch: Architecture, config: TransformerConfig, settings: ModelSettings, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    options = dict(qk_layernorm=arch.qk_norm, num_experts=arch.experts.count if arch.experts else None)
    norm: Any = LocalRMSNorm
    if settings.backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_spec(**options, moe_grouped_gemm=arch.experts is not None)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalRMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if settings.fp8_emulation:
            mlp = mlp_submodules(layer)
            attention.linear_qkv, attention.linear_proj = EmulatedColumnParallelLinear, EmulatedRowParallelLinear
            mlp.linear_fc1, mlp.linear_fc2 = EmulatedColumnParallelLinear, EmulatedRowParallelLinear
        if arch.qk_norm:
            attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    if arch.post_norms:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = normed_residual(config, norm)
    columns = rope_columns(arch)
    if columns is not None:
        layer.module, layer.params = RotaryLayer, layer.params | {"columns": columns}
    if arch.experts is not None:
        layer.module = ExpertLayer
        mlp_submodules(layer).router = BalancedRouter
        if settings.backend == "local":
            layer.submodules.sharded_state_dict_keys_map = ATTENTION_NORM
    if settings.backend == "transformer_engine":
        return layer
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=LocalRMSNorm)
