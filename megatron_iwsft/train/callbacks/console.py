"""One line per step on the terminal."""

from __future__ import annotations

from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.text import say


def progress_line(result: StepResult) -> None:
    """Print step, loss, weights, gradient norm, learning rate and speed."""
    m = result.metrics
    if m.get("loss") is None:
        say(f"step {result.step}/{result.total_steps} | passed over: {m['skipped']}")
        return
    parts = [f"step {result.step}/{result.total_steps}", f"loss {m['loss']:.4f}", f"nll {m['nll']:.4f}"]
    if "weighted_log_ratio" in m:
        parts.append(f"w {m['weight_mean']:.3f} (max {m['weight_max']:.2f}, ess {m['weight_ess']:.2f})")
    parts += [f"grad {m['grad_norm']:.3f}", f"lr {m['lr']:.2e}", f"{m['tokens_per_s']:,.0f} tokens/s"]
    if "eval_nll" in m:
        parts.append(f"eval nll {m['eval_nll']:.4f}")
    if "skipped" in m:
        parts.append(f"skipped: {m['skipped']}")
    say(" | ".join(parts))
