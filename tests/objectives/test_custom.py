"""Custom objectives: loaded from a file, tried on made-up trajectories, rejected with the rule that they break."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.custom import find_objective
from megatron_iwsft.objectives.functions import OBJECTIVES, iw_sft, sft

HEAD = (
    "import torch\nfrom megatron_iwsft.objectives.functions import Objective, Weighted\n"
    "from megatron_iwsft.objectives.metrics import Metric\n\ndef mine(t, s):\n"
)
WEIGHT = "    w = torch.sigmoid(t.proposal - t.reference) * t.mask\n"
RETURN = "    return Weighted(loss=-w * t.logprobs, weight=w, clipped=torch.zeros_like(w))\n"


def test_a_valid_objective_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(HEAD + WEIGHT + RETURN)
    found = find_objective(f"{tmp_path}/own.py:mine")
    assert found.needs_reference and found.weighted and found.name.endswith("own.py:mine")
    (tmp_path / "free.py").write_text(
        HEAD
        + WEIGHT
        + RETURN.replace("zeros_like(w)", "zeros_like(w), extra={'squares': w * w}")
        + "own = Objective('own', mine, needs_reference=False,\n"
        + "    metrics=(Metric('weight_square', 'mean squared weight', 'squares', 'tokens'),))\n"
    )
    found = find_objective(f"{tmp_path}/free.py:own")
    assert not found.needs_reference and found.name == "own"
    assert [OBJECTIVES[n].needs_reference for n in ("sft", "iw_sft", "dft", "psft")] == [False, True, False, True]
    assert find_objective("sft") is sft and find_objective("iw_sft") is iw_sft


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 1 / 0\n", "fails: ZeroDivisionError"),
        ("    return (t.logprobs * t.mask).mean()\n", "fails: AttributeError"),
        (WEIGHT + RETURN.replace("-w * t.logprobs", "(-w * t.logprobs).sum()"), r"must return loss as float32 \\[T\\]"),
        (WEIGHT + RETURN.replace("-w * t.logprobs", "-w * t.logprobs.detach()"), "must return a loss with gradient"),
        (
            WEIGHT + RETURN.replace("-w * t.logprobs", "-t.logprobs.exp()"),
            "must return loss finite, and 0 where not trained on",
        ),
        (
            WEIGHT + RETURN.replace("-w * t.logprobs", "-w * t.logprobs / t.mask.sum()"),
            "one trajectory's loss depend on another",
        ),
        (WEIGHT + RETURN.replace("-w * t.logprobs", "-w * (t.logprobs - 5).sqrt()"), "finite"),
    ],
)
def test_an_invalid_objective_is_rejected(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "own.py").write_text(HEAD + body)
    with pytest.raises(ConfigError, match=message.replace("\\\\", "\\")):
        find_objective(f"{tmp_path}/own.py:mine")


def test_an_objective_that_cannot_be_loaded_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.py is not a Python file"):
        find_objective("nowhere.py:f")
    (tmp_path / "own.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="does not define mine"):
        find_objective(f"{tmp_path}/own.py:mine")
    (tmp_path / "own.py").write_text("import does_not_exist\n")
    with pytest.raises(ConfigError, match="cannot be loaded: ModuleNotFoundError"):
        find_objective(f"{tmp_path}/own.py:mine")
    assert torch.is_grad_enabled()
