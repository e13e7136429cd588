"""How many small collectives a step makes, besides the reduction of gradients and the gathering of parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.testing import run_distributed
from tests.support import tiny

pytestmark = pytest.mark.parallel

SMALL = 1000  # elements
COUNTED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "all_gather_object",
    "broadcast_object_list",
)


def collectives_of_a_step(platform: Any, directory: Path) -> tuple[list[str], list[str]]:
    """The third step's small collectives, as name and number of elements, in order; and the types of the trainer's callbacks."""
    from contextlib import ExitStack

    from megatron_iwsft.distributed.stop_signals import StopSignals
    from megatron_iwsft.train.check import check
    from megatron_iwsft.train.setup import start
    from megatron_iwsft.train.trainer import Trainer

    text = f"""
run: {{name: x, dir: {directory}/run}}
model: {{config: {json.dumps(tiny.model_config())}}}
data: {{corpus: {directory}/corpus, seq_length: 128, global_batch_size: 2, max_steps: 3}}
objective: {{name: sft}}
precision: {{dtype: fp32}}
"""
    found: list[str] = []
    with StopSignals() as stop:
        run = start(check(parse_config(text, [], where="test"), world_size=platform.world_size))
        with run.watchdog() as watch, ExitStack() as at_exit:
            trainer = Trainer(run, watch, stop, at_exit)
            for step in (1, 2):
                trainer.train_step(step)
            for name in COUNTED:
                original = getattr(dist, name)

                def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
                    size = next((a.numel() for a in args if torch.is_tensor(a)), 0)
                    if size < SMALL:
                        found.append(f"{name} {size}")
                    return original(*args, **options)

                setattr(dist, name, counted)
            trainer.train_step(3)
            return found, [type(callback.function).__name__ for callback in trainer.callbacks]


def test_a_step_makes_few_small_collectives(tmp_path: Path) -> None:
    tiny.token_corpus(tmp_path, tiny.LENGTHS, scores=True)
    (first, callbacks), (second, _) = run_distributed(collectives_of_a_step, 2, tmp_path)
    assert first == second
    # Sums of the loss; the gradient norm; what every rank says of itself.
    assert [text.split()[0] for text in first] == ["all_reduce", "all_reduce", "all_gather_into_tensor"], first
    assert "all_reduce 0" not in first
    assert "SlowRanks" in callbacks, "what is gathered is looked at"
