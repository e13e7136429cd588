"""Golden curves: loss and gradient norm over 50 steps of a small fixed run, for each objective and several layouts.

Within 1e-5 of golden_curves.json, which another machine may have written: kernels, and so the last bits, differ between CPUs.
`python -m tests.train.test_golden` rewrites the file: only for a change that is meant to change numbers.
"""

from __future__ import annotations

import json
import platform as machine
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.testing import comparable_metrics, run_distributed
from tests.support import tiny
from tests.support.shared_runs import SharedRuns

pytestmark = [pytest.mark.parallel, pytest.mark.numerics]

CURVES = Path(__file__).parent / "golden_curves.json"
STEPS = 50
TOLERANCE = 1e-5
OBJECTIVES = {
    "sft": "objective.name=sft",
    "iw_sft": "data.quality.mode=sample",
    "iw_sft_weights": "objective={temperature: 3.0, normalize: weights}",
    "iw_sft_token": "objective={level: token, normalize: sequences}",
    "dft": "objective.name=dft",
    "psft": "objective.name=psft",
}
# On two processes: name → (objective, degrees).
LAYOUTS: dict[str, tuple[str, dict]] = {
    "sft-vp2": ("sft", dict(pipeline=2, virtual_pipeline=2)),
    "iw_sft-cp2": ("iw_sft", dict(context=2)),
    "iw_sft_weights-dp2": ("iw_sft_weights", dict()),
    "iw_sft_token-tp2": ("iw_sft_token", dict(tensor=2, sequence=True)),
}
Curve = list[list[float]]


def config(directory: Path, name: str, objective: str, parallel: dict) -> Config:
    model = tiny.model_config(hidden_size=32, intermediate_size=48, tie_word_embeddings=True)
    text = f"""
run: {{name: golden, dir: {directory}/{name}, seed: 11}}
model: {{config: {json.dumps(model)}}}
data: {{corpus: {directory}/corpus, seq_length: 128, pad_to: 1, global_batch_size: 4, max_steps: {STEPS}, quality: {{mode: weight}}}}
precision: {{dtype: fp32}}
parallel: {json.dumps(parallel)}
optimizer: {{lr: 2.0e-3, weight_decay: 0.1}}
checkpoint: {{every: 0}}
"""
    return parse_config(text, [OBJECTIVES[objective]], where=objective)


def prepare(runs: SharedRuns, name: str) -> Config:
    objective, parallel = LAYOUTS.get(name, (name, {}))
    return config(runs.directory, name, objective, parallel)


def precompute(platform, settings: Config) -> None:
    from megatron_iwsft.train.precompute import precompute_reference

    precompute_reference(settings)


def shared_runs(directory: Path) -> dict[int, SharedRuns]:
    """By number of processes. All start from one random model, so they share one reference sidecar."""
    tiny.token_corpus(directory, [30 + (i * 37) % 90 for i in range(60)], scores=True)
    run_distributed(precompute, 1, config(directory, "iw_sft", "iw_sft", {}))
    return {
        1: SharedRuns(directory, prepare, [[*OBJECTIVES]], world_size=1),
        2: SharedRuns(directory, prepare, [[*LAYOUTS]], world_size=2),
    }


@pytest.fixture(scope="module")
def golden_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, SharedRuns]:
    return shared_runs(tmp_path_factory.mktemp("golden"))


def curve(run: Path) -> Curve:
    """[loss, gradient norm] of every step."""
    return [[m["loss"], m["grad_norm"]] for m in comparable_metrics(run)]


def assert_as_stored(found: Curve, objective: str) -> None:
    """The largest relative difference from the stored curve is within TOLERANCE."""
    stored = json.loads(CURVES.read_text())["curves"][objective]
    assert len(found) == len(stored) == STEPS
    difference = max(abs(a - b) / abs(b) for x, y in zip(found, stored, strict=True) for a, b in zip(x, y, strict=True))
    print(f"\n{objective}: differs by {difference:.1e}", end="")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_curve_is_as_stored(objective: str, golden_runs: dict[int, SharedRuns]) -> None:
    assert_as_stored(curve(golden_runs[1](objective)), objective)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_curve_at_another_layout_is_as_stored(name: str, golden_runs: dict[int, SharedRuns]) -> None:
    assert_as_stored(curve(golden_runs[2](name)), LAYOUTS[name][0])


def test_every_objective_is_stored() -> None:
    assert json.loads(CURVES.read_text())["curves"].keys() == OBJECTIVES.keys()


def rewrite() -> None:
    with tempfile.TemporaryDirectory() as directory:
        runs = shared_runs(Path(directory))[1]
        found = {objective: curve(runs(objective)) for objective in OBJECTIVES}
    made_with = json.dumps({"torch": torch.__version__, "machine": machine.machine()})
    curves = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, found[name])) + "\n]" for name in found)
    CURVES.write_text(f'{{"made_with": {made_with},\n"curves": {{\n{curves}\n}}}}\n')


if __name__ == "__main__":
    rewrite()
