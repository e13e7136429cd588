"""An independent reference: a decoder in plain torch with Hugging Face's tensor names, and the objectives from full logits.

It shares no code with the package: one trajectory at a time, no packing, no parallelism, any dtype.
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


def swiglu(w: dict[str, Tensor], p: str, h: Tensor) -> Tensor:
    gate, up = (h @ w[p + f"{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate * torch.sigmoid(gate) * up) @ w[p + "down_proj.weight"].T


def geglu(w: dict[str, Tensor], p: str, h: Tensor) -> Tensor:
    gate, up = (h @ w[p + f"{name}_proj.weight"].T for name in ("gate", "up"))
    bent = torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    return (0.5 * gate * (1 + bent) * up) @ w[p + "down_proj.weight"].T


def experts(w: dict[str, Tensor], config: dict, p: str, h: Tensor, routed: list | None) -> Tensor:
    """Every expert on every token, weighted; (probabilities, chosen) [n, experts] of the layer are appended to `routed`."""
    probs = torch.softmax(h @ w[p + "gate.weight"].T, dim=-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(config["num_experts_per_tok"], dim=-1).indices, 1.0)
    weight = probs * chosen
    if config["norm_topk_prob"]:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    if routed is not None:
        routed.append((probs, chosen))
    return sum(weight[:, e, None] * swiglu(w, p + f"experts.{e}.", h) for e in range(config["num_experts"]))


def router_balance(routed: list, config: dict, mask: Tensor) -> Tensor:
    """Σ over layers of experts/(chosen·n²) · Σ_e count_e · probability_e over the n positions of `mask` [tokens]."""
    total = torch.zeros((), dtype=torch.float64)
    for probs, chosen in routed:
        probs, chosen = probs[mask.bool()], chosen[mask.bool()]
        scale = config["num_experts"] / (config["num_experts_per_tok"] * len(probs) ** 2)
        total = total + scale * (probs.sum(0) * chosen.sum(0)).sum()
    return total


def logits(w: dict[str, Tensor], config: dict, tokens: Tensor, routed: list | None = None) -> Tensor:
    """tokens [n] → [n, vocabulary]."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // heads
    gemma = config["model_type"] == "gemma3_text"
    n = len(tokens)
    x = w["model.embed_tokens.weight"][tokens] * (math.sqrt(config["hidden_size"]) if gemma else 1.0)
    hidden = torch.full((n, n), -math.inf, dtype=x.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, w[f"{name}.weight"] + (1.0 if gemma else 0.0), config["rms_norm_eps"])

    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        local = gemma and (layer + 1) % config["sliding_window_pattern"] != 0
        masked = hidden.triu(1)
        if local or config.get("use_sliding_window") or config["model_type"] == "mistral":
            masked = masked + hidden.tril(-config["sliding_window"])
        h = norm(x, p + "input_layernorm")
        q, k, v = (
            h @ w[p + f"self_attn.{name}_proj.weight"].T + w.get(p + f"self_attn.{name}_proj.bias", 0.0)
            for name in "qkv"
        )
        q, k = q.view(n, heads, d), k.view(n, groups, d)
        if config["model_type"].startswith("qwen3") or gemma:
            q, k = (norm(x_, p + f"self_attn.{name}_norm") for name, x_ in (("q", q), ("k", k)))
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        if config.get("no_rope_layers", [1] * (layer + 1))[layer]:
            q, k = (rotate(x_, config["rope_local_base_freq" if local else "rope_theta"]) for x_ in (q, k))
        k, v = (t.repeat_interleave(heads // groups, dim=0) for t in (k, v.view(n, groups, d).transpose(0, 1)))
        scores = q @ k.transpose(1, 2) / math.sqrt(config.get("query_pre_attn_scalar", d))
        attention = torch.softmax(scores + masked, dim=-1)
        out = (attention @ v).transpose(0, 1).reshape(n, heads * d) @ w[p + "self_attn.o_proj.weight"].T
        if gemma:
            x = x + norm(out, p + "post_attention_layernorm")
            out = geglu(w, p + "mlp.", norm(x, p + "pre_feedforward_layernorm"))
            x = x + norm(out, p + "post_feedforward_layernorm")
            continue
        x = x + out
        h = norm(x, p + "post_attention_layernorm")
        x = x + (experts(w, config, p + "mlp.", h, routed) if "num_experts" in config else swiglu(w, p + "mlp.", h))
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def logprobs(w: dict[str, Tensor], config: dict, tokens: Tensor, routed: list | None = None) -> Tensor:
    """log π(token t | before) for t = 1 …, [n−1]."""
    return torch.log_softmax(logits(w, config, tokens, routed)[:-1], dim=-1).gather(1, tokens[1:, None])[:, 0]


def loss(trajectories: list[tuple[Tensor, ...]], objective: dict) -> Tensor:
    """The objective over a batch of (log-probs, reference log-probs, mask, quality[, proposal's log-probs]), each but quality [n−1].

    quality: of the trajectory, or of each token [n−1].
    """
    tau, (low, high) = objective["temperature"], objective["clip"]
    numerator = torch.zeros((), dtype=torch.float64)
    tokens = weights = sequences = 0.0
    for ell, r, mask, s, *lagged in trajectories:
        q = lagged[0] if lagged else ell
        ell, r, q = (x[mask.bool()].double() for x in (ell, r, q))
        if len(ell) == 0:
            continue
        s = s[mask.bool()] if isinstance(s, Tensor) else s
        ratio = q.detach() - r
        if objective["name"] == "sft":
            w = torch.ones_like(ratio)
        elif objective["name"] == "dft":
            w = torch.exp(ell.detach())
        elif objective["name"] == "psft":
            w = torch.ones_like(ratio)
        elif objective["level"] in ("sequence", "trajectory"):
            of_all = ratio.mean() if objective["level"] == "sequence" else ratio.sum()
            w = torch.exp(tau * of_all).clamp(low, high) * torch.ones_like(ratio)
        else:
            w = torch.exp(tau * ratio).clamp(low, high)
        gain = w * ell
        if objective["name"] == "psft":
            rho = torch.exp(ell - r)
            gain, w = torch.minimum(rho, rho.clamp(low, high)), torch.where(rho > high, 0.0, rho).detach()
        mean = len(ell) if objective["normalize"].startswith("sequence") else 1
        numerator = numerator - (s * gain).sum() / mean
        tokens += len(ell)
        weights += (s * w).sum().item() / mean
        sequences += 1
    denominators = {"tokens": tokens, "weights": weights, "sequences": sequences, "sequence_weights": weights}
    return numerator / denominators[objective["normalize"]]
