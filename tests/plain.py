"""An independent reference: a decoder in plain torch with Hugging Face's tensor names, and the objectives from full logits.

Shares no code with the package. One trajectory at a time, no packing, no parallelism, any dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [heads, n, d]: rotary positions, halves rotated against each other."""
    n, d = x.shape[-2:]
    inverse = theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.outer(torch.arange(n, dtype=torch.float32), inverse).to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def logits(w: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """tokens [n] → [n, vocabulary]."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // heads
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    n = len(tokens)
    x = w["model.embed_tokens.weight"][tokens]
    hidden_future = torch.full((n, n), -math.inf, dtype=x.dtype).triu(1)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = (
            h @ w[p + f"self_attn.{name}_proj.weight"].T + w.get(p + f"self_attn.{name}_proj.bias", 0.0)
            for name in "qkv"
        )
        q = rotate(q.view(n, heads, d).transpose(0, 1), theta)
        k = rotate(k.view(n, groups, d).transpose(0, 1), theta)
        k, v = (t.repeat_interleave(heads // groups, dim=0) for t in (k, v.view(n, groups, d).transpose(0, 1)))
        attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d) + hidden_future, dim=-1)
        x = x + (attention @ v).transpose(0, 1).reshape(n, heads * d) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def logprobs(w: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """log π(token t | before) for t = 1 …, [n−1]."""
    return torch.log_softmax(logits(w, config, tokens)[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]


def loss(trajectories: list[tuple[Tensor, Tensor, Tensor, float]], objective: dict) -> Tensor:
    """The objective over a batch of (log-probs, reference log-probs, mask, quality), each of the first three [n−1]."""
    tau, (low, high) = objective["temperature"], objective["clip"]
    numerator = torch.zeros((), dtype=torch.float64)
    tokens = weights = sequences = 0.0
    for ell, r, mask, s in trajectories:
        ell, r = ell[mask.bool()].double(), r[mask.bool()].double()
        if len(ell) == 0:
            continue
        ratio = ell.detach() - r
        if objective["name"] == "sft":
            w = torch.ones_like(ratio)
        elif objective["level"] == "sequence":
            w = torch.exp(tau * ratio.mean()).clamp(low, high) * torch.ones_like(ratio)
        else:
            w = torch.exp(tau * ratio).clamp(low, high)
        mean = len(ell) if objective["normalize"] == "sequences" else 1
        numerator = numerator - s * (w * ell).sum() / mean
        tokens += len(ell)
        weights += s * w.sum().item()
        sequences += 1
    return numerator / {"tokens": tokens, "weights": weights, "sequences": sequences}[objective["normalize"]]
