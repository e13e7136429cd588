"""Golden curves: loss and gradient norm over 50 steps of a small fixed run, for each objective and several layouts.

Within 1e-5 of golden/curves.json, which another machine may have written: kernels, and so the last bits, differ between CPUs.
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
from megatron_iwsft.testing import run_distributed
from tests.support import tiny

pytestmark = pytest.mark.parallel

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
LAYOUTS = {
    "sft": [dict(pipeline=2, virtual_pipeline=2)],
    "iw_sft": [dict(tensor=2, sequence=True), dict(context=2)],
    "iw_sft_weights": [dict(), dict(pipeline=2)],  # data parallel 2
    "iw_sft_token": [dict(tensor=2)],
    "dft": [dict(tensor=2)],
    "psft": [dict(pipeline=2)],
}


def config(tmp: Path, objective: str, parallel: dict, world_size: int) -> Config:
    model = tiny.model_config(hidden_size=32, intermediate_size=48, tie_word_embeddings=True)
    text = f"""
run: {{name: golden, dir: {tmp}/runs/{objective}-{"-".join(parallel)}-{world_size}, seed: 11}}
model: {{config: {json.dumps(model)}}}
data: {{corpus: {tmp}/corpus, seq_length: 128, global_batch_size: 4, max_steps: {STEPS}, quality: {{mode: weight}}}}
precision: {{dtype: fp32}}
parallel: {json.dumps(parallel)}
optimizer: {{lr: 2.0e-3, weight_decay: 0.1}}
checkpoint: {{every: 0}}
"""
    return parse_config(text, [OBJECTIVES[objective]], where=objective)


def curves(platform, tmp: Path, runs: list[tuple[str, dict]]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of every step of each run."""
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    out = []
    for objective, parallel in runs:
        settings = config(tmp, objective, parallel, platform.world_size)
        precompute_reference(settings)  # once: the next run finds it complete
        train(settings)
        lines = (Path(settings.run.dir) / "metrics.jsonl").read_text().splitlines()
        out.append([(m["loss"], m["grad_norm"]) for m in map(json.loads, lines)])
    return out


def made_with() -> dict[str, str]:
    return {"torch": torch.__version__, "machine": machine.machine()}


def on_one_process(tmp: Path) -> dict[str, list]:
    tiny.token_corpus(tmp, [30 + (i * 37) % 90 for i in range(60)], scores=True)
    return dict(zip(OBJECTIVES, run_distributed(curves, 1, tmp, [(o, {}) for o in OBJECTIVES])[0], strict=True))


def apart(found: list, expected: list) -> float:
    """Largest relative difference of two curves."""
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_curves_are_as_stored(tmp_path: Path) -> None:
    stored = json.loads(CURVES.read_text())
    found = on_one_process(tmp_path)
    for objective, curve in stored["curves"].items():
        assert len(curve) == STEPS
        difference = apart(found[objective], curve)
        print(f"\n{objective:16} one process  {difference:.1e}", end="")
        assert difference <= TOLERANCE, objective

    others = [(objective, layout) for objective in OBJECTIVES for layout in LAYOUTS[objective]]
    for (objective, layout), curve in zip(others, run_distributed(curves, 2, tmp_path, others)[0], strict=True):
        difference = apart(curve, stored["curves"][objective])
        print(f"\n{objective:16} {layout or 'data parallel'}  {difference:.1e}", end="")
        assert difference <= TOLERANCE, (objective, layout)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        found = on_one_process(Path(directory))
    lines = [
        f'"{name}": [\n{rows}\n]' for name, rows in ((n, ",\n".join(map(json.dumps, c))) for n, c in found.items())
    ]
    CURVES.write_text(f'{{"made_with": {json.dumps(made_with())},\n"curves": {{\n' + ",\n".join(lines) + "\n}}\n")
