"""What does not go together in a config is refused before a job starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.train.check import check
from megatron_iwsft.train.precompute import precompute_reference
from megatron_iwsft.train.setup import StartedRun
from tests.support import tiny


def config(directory: Path, *overrides: str) -> Config:
    text = f"""
run: {{name: refused, dir: {directory}/run, seed: 3}}
model: {{config: {json.dumps(tiny.model_config())}}}
data: {{corpus: {tiny.token_corpus(directory, [20, 30]).directory}, seq_length: 64, max_steps: 1}}
objective: {{name: iw_sft}}
precision: {{dtype: bf16, fp8: delayed}}
"""
    return parse_config(text, list(overrides), where="test")


@pytest.mark.parametrize("command", [lambda config: check(config, world_size=1), precompute_reference])
def test_a_cached_reference_is_refused_with_delayed_scaling(command, tmp_path: Path) -> None:
    """Its scales would stay at 1: they follow passes with gradients."""
    with pytest.raises(
        ConfigError, match=r"reference.source cached does not go with precision.fp8 delayed.*source: live"
    ):
        command(config(tmp_path))


@pytest.mark.parametrize("allowed", ["reference.source=live", "precision.fp8=tensorwise", "objective.name=sft"])
def test_delayed_scaling_and_cached_references_are_refused_only_together(allowed: str, tmp_path: Path) -> None:
    check(config(tmp_path, allowed), world_size=1)


def test_only_real_delayed_scaling_follows_the_steps(tmp_path: Path) -> None:
    others = ("precision.fp8=tensorwise", "precision.fp8_emulation=true")
    assert config(tmp_path).precision.scaled_by_steps
    assert not any(config(tmp_path, other).precision.scaled_by_steps for other in others)


@pytest.mark.parametrize(("replicas", "is_cuda", "overlaps"), [(1, True, False), (2, True, True), (2, False, False)])
def test_communication_overlaps_on_gpus_with_replicas(
    replicas: int, is_cuda: bool, overlaps: bool, tmp_path: Path
) -> None:
    checked = check(config(tmp_path, "objective.name=sft", "data.global_batch_size=2"), world_size=replicas)
    platform: Any = SimpleNamespace(is_cuda=is_cuda)
    optimizer = StartedRun(**vars(checked), platform=platform, parallel=cast(Any, None)).optimizer
    assert (optimizer.overlap_grad_reduce, optimizer.overlap_param_gather) == (overlaps, overlaps)
