"""Mixture of experts: Megatron-Core's layers with a load-balancing loss that is the same for every parallel layout.

Megatron-Core's auxiliary losses are means over one micro-batch, padding included, so they depend on packing, micro-batch size and
data parallelism. This loss is defined per trajectory i: with n trained tokens, E experts, K chosen experts per token, p_te the
router's softmax, and c_te = 1 if expert e is chosen for token t (else 0),

    B_i = E / (K n²) · Σ_e (Σ_t c_te) (Σ_t p_te)          1 if perfectly balanced

(the sequence-wise loss of DeepSeek-V3, arXiv 2412.19437, section 2.1.2). The loss added to the objective is
coefficient · (1/N) Σ_layers Σ_i u_i B_i, where u_i is n for `normalize: tokens` and 1 for `sequences`: a mean over the same units as
the objective, without importance or quality weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_iwsft.data.batch import Batch


@dataclass(frozen=True)
class Balance:
    """The routers' inputs for one micro-batch, and the accumulator of their loss.

    mask float32 [T], segment int64 [T], lengths float32 [S]: as in `Batch`
    unit  float32 [S]  u_i
    total float64 []   each layer adds this rank's part of Σ_i u_i B_i
    """

    coefficient: float
    mask: Tensor
    segment: Tensor
    lengths: Tensor
    unit: Tensor
    total: Tensor

    @staticmethod
    def of(batch: Batch, *, coefficient: float, per_token: bool, total: Tensor) -> Balance:
        """per_token: if true, u_i is the number of trained tokens, else 1."""
        unit = batch.lengths if per_token else (batch.lengths > 0).float()
        return Balance(coefficient, batch.mask, batch.segment, batch.lengths, unit, total)


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron-Core's packed-sequence parameters with our `balance`: these reach every layer, also during recomputation."""

    balance: Balance | None = None

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """`cu_seqlens_q` on the host. Cached, so that attention synchronises with the GPU once per row and not once per layer."""
        return tuple(self.cu_seqlens_q.tolist())


class ExpertLayer(TransformerLayer):
    """A transformer layer that passes the row's `balance` to its router."""

    def forward(self, *args: Any, packed_seq_params: PackedRow, **kwargs: Any) -> Any:
        self.mlp.router.balance = packed_seq_params.balance
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class BalancedRouter(TopKRouter):
    """Megatron-Core's top-k router with the balance loss above.

    Collectives: in forward an all-reduce of [S, E] over the tensor- and context-parallel ranks, if they share trajectories.
    """

    balance: Balance | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = super().routing(logits, padding_mask=padding_mask, **kwargs)
        if self.balance is not None and torch.is_grad_enabled():  # true once per layer, with recomputation too
            scores = torch.softmax(logits.view(-1, logits.shape[-1]).float(), dim=-1)
            loss = self._loss(scores, routing_map, self.balance)
            self.balance.total.add_(loss.detach())
            probs = MoEAuxLossAutoScaler.apply(probs, self.balance.coefficient * loss)
        return probs, routing_map

    def _loss(self, scores: Tensor, routing_map: Tensor, balance: Balance) -> Tensor:
        """This rank's part of Σ_i u_i B_i. scores float32, routing_map bool: both [T, E], or [T/tp, E] with sequence parallelism."""
        tokens = scores.shape[0]
        if tokens < balance.mask.numel():  # sequence parallel: this rank's rows
            first = self.tp_group.rank() * tokens
            mask, segment = (x[first : first + tokens] for x in (balance.mask, balance.segment))
        else:
            mask, segment = balance.mask, balance.segment
        experts = scores.shape[1]
        chosen = scores.new_zeros(balance.lengths.numel(), experts)
        chosen.index_add_(0, segment, routing_map * mask.unsqueeze(1))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        share = balance.unit * experts / (self.topk * balance.lengths.clamp(min=1.0) ** 2)
        # Σ_t p_te stays local to this rank's tokens: summed over ranks, value and gradient are complete.
        return (scores * mask.unsqueeze(1) * (share.unsqueeze(1) * chosen)[segment]).sum()
