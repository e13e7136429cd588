"""One line per step on the terminal."""

from __future__ import annotations

from typing import Any

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.text import say


def progress_line(result: StepResult) -> None:
    """Print step, loss, weights, gradient norm, learning rate and speed."""
    m = result.metrics
    if result.step == 0:
        say(" | ".join([f"step 0/{result.total_steps}", *_evaluated(m)]))
        return
    if m.get("loss") is None:
        parts = [f"step {result.step}/{result.total_steps}", f"passed over: {m['skipped']}", *_evaluated(m)]
        say(" | ".join(parts))
        return
    parts = [f"step {result.step}/{result.total_steps}", f"loss {m['loss']:.4f}", f"nll {m['nll']:.4f}"]
    if "weighted_log_ratio" in m:
        parts.append(f"w {m['weight_mean']:.3f} (max {m['weight_max']:.2f}, ess {m['weight_ess']:.2f})")
    parts += [f"grad {m['grad_norm']:.3f}", f"lr {m['lr']:.2e}", f"{m['tokens_per_s']:,.0f} tokens/s"]
    parts += _evaluated(m)
    if "skipped" in m:
        parts.append(f"skipped: {m['skipped']}")
    say(" | ".join(parts))


def _evaluated(metrics: dict[str, Any]) -> list[str]:
    """The nll of each evaluation set, where it was evaluated."""
    names = {name: name.removeprefix("eval/").removesuffix("/nll") for name in metrics if name.startswith("eval/")}
    return [f"{shown} nll {metrics[name]:.4f}" for name, shown in names.items() if name == f"eval/{shown}/nll"]
