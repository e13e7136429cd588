"""Lagged proposals and refreshed references in the trainer, against the formulas in float64 and plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.checkpoint.tensors import hugging_face_reader
from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.reference.frozen_stage import StageWithFrozenModels
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from tests.support import plain_model, tiny
from tests.support.shared_runs import SharedRuns, copy_without_checkpoints_after

pytestmark = pytest.mark.parallel

MODEL = tiny.model_config(num_hidden_layers=4, tie_word_embeddings=True)
STEPS = 5
PROPOSALS = {
    "ema": "objective.proposal={kind: ema, decay: 0.25, update_every: 2}",
    "snapshot": "objective.proposal={kind: snapshot, update_every: 3}",
    "refresh": "reference.refresh=2",
    "refresh-epoch": "reference.refresh=epoch",
}
MOE = tiny.model_config(
    "qwen3_moe", num_hidden_layers=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
)
BFLOAT16 = (PROPOSALS["ema"], "precision.dtype=bf16")
EXPERTS = (PROPOSALS["ema"], f"model.config={json.dumps(MOE)}", "parallel={expert: 2}", "evaluation.every=2")
PIPELINE = ("parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2", "parallel.virtual_pipeline=2")


def config(tmp: Path, name: str, *overrides: str) -> Config:
    text = f"""
run: {{name: {name}, dir: {tmp}/{name}, seed: 3}}
model: {{config: {json.dumps(MODEL)}}}
data: {{corpus: {tmp}/corpus, seq_length: 96, global_batch_size: 4, max_steps: {STEPS}, quality: {{mode: weight}}}}
objective: {{name: iw_sft, temperature: 3.0, clip: [0.1, 9.0], normalize: weights}}
reference: {{source: live}}
parallel: {{tensor: 2, sequence: true}}
precision: {{dtype: fp32}}
optimizer: {{lr: 5.0e-3, schedule: constant, warmup_fraction: 0.0}}
checkpoint: {{every: 1, keep: 9}}
"""
    return parse_config(text, list(overrides), where=name)


# What distinguishes each run from `config`. A resumed run is interrupted after step 3.
RUNS = {name: (setting,) for name, setting in PROPOSALS.items()} | {
    "offload": (PROPOSALS["ema"], "reference.offload=true"),
    "interleaved": (PROPOSALS["ema"], *PIPELINE),
    "bf16": BFLOAT16,
    "experts": EXPERTS,
    "resumed": (PROPOSALS["ema"],),
    "resumed-interleaved": (PROPOSALS["ema"], *PIPELINE),
    "resumed-bf16": BFLOAT16,
    "resumed-experts": EXPERTS,
}
UNINTERRUPTED = {"resumed": "ema", "resumed-interleaved": "ema", "resumed-bf16": "bf16", "resumed-experts": "experts"}
GROUPS = [[*PROPOSALS], ["offload", "interleaved", "bf16", "experts"], [*UNINTERRUPTED]]


def prepare(runs: SharedRuns, name: str) -> Config:
    if name in UNINTERRUPTED:
        copy_without_checkpoints_after(3, runs(UNINTERRUPTED[name]), runs.directory / name)
    evaluation = [f"evaluation.sets=[{{name: held-out, corpus: {runs.directory}/corpus}}]"] if "experts" in name else []
    return config(runs.directory, name, *RUNS[name], *evaluation)


@pytest.fixture(scope="module")
def lagged_runs(tmp_path_factory: pytest.TempPathFactory) -> SharedRuns:
    directory = tmp_path_factory.mktemp("lagged")
    tiny.token_corpus(directory, [20 + (i * 37) % 70 for i in range(20)], scores=True)
    return SharedRuns(directory, prepare, GROUPS)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["step"]]


def policies(run: Path) -> list[dict[str, Tensor]]:
    """The policy's weights before each step, float64: the initial ones, then every checkpoint's."""
    from megatron_iwsft.hf.architecture import Architecture
    from megatron_iwsft.hf.directory import RandomInit
    from megatron_iwsft.hf.mapping import shapes

    arch = Architecture.from_hf(MODEL, where="test")
    source = RandomInit(arch, 3)
    out = [{name: source.read(name, (0, 0, shape[0])).double() for name, shape in shapes(arch).items()}]
    for directory in sorted((run / "checkpoints").glob("step-*")):
        read, names = hugging_face_reader(directory, CheckpointInfo.read(directory).architecture)
        out.append({name: read(name).double() for name in names})
    return out


def expected_losses(runs: SharedRuns, run: str) -> list[float]:
    """Every step's loss in float64 from the run's policies, with proposal and reference as its config describes them."""
    settings = config(runs.directory, run, PROPOSALS[run])
    mixture = open_mixture(settings)
    sampler, weights = make_sampler(settings, mixture), policies(runs(run))
    steps_in_epoch = sampler.steps_in(0)
    proposal: dict[str, Tensor] | None = weights[0] if "refresh" not in run else None
    reference = weights[0]
    objective = dict(name="iw_sft", level="sequence", temperature=3.0, clip=(0.1, 9.0), normalize="weights")
    out = []
    for step in range(STEPS):
        policy = weights[step]
        if step and run == "ema" and step % 2 == 0:
            proposal = {name: 0.25 * old + 0.75 * policy[name] for name, old in proposal.items()}
        if step and run == "snapshot" and step % 3 == 0:
            proposal = policy
        if step and ((run == "refresh" and step % 2 == 0) or (run == "refresh-epoch" and step % steps_in_epoch == 0)):
            reference = policy
        batch = []
        for i in np.concatenate(sampler.packs_at(step)).tolist():
            tokens = torch.from_numpy(mixture.tokens(i).astype(np.int64))
            mask = torch.from_numpy(mixture.mask(i)[1:].astype(np.int64))
            ell, r, q = (plain_model.logprobs(w, MODEL, tokens) for w in (policy, reference, proposal or policy))
            batch.append((ell, r, mask, float(np.float32(mixture.scores[i])), q))
        out.append(float(plain_model.loss(batch, objective)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("run", PROPOSALS)
def test_proposals_and_refreshed_references_follow_the_formula(run: str, lagged_runs: SharedRuns) -> None:
    found, expected = losses(lagged_runs(run)), expected_losses(lagged_runs, run)
    assert np.allclose(found, expected, rtol=2e-6, atol=0), (found, expected)
    assert len(set(found)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "tolerance"), [("resumed", 0.0), ("offload", 0.0), ("resumed-interleaved", 1e-5), ("interleaved", 1e-5)]
)
def test_an_ema_is_the_same_at_any_layout_offloaded_and_resumed(
    run: str, tolerance: float, lagged_runs: SharedRuns
) -> None:
    assert np.allclose(losses(lagged_runs(run)), losses(lagged_runs("ema")), rtol=tolerance, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["bf16", "experts"])
def test_an_ema_in_bf16_or_of_experts_is_resumed_bit_for_bit(run: str, lagged_runs: SharedRuns) -> None:
    uninterrupted = losses(lagged_runs(run))
    assert losses(lagged_runs(f"resumed-{run}")) == uninterrupted
    assert len(set(uninterrupted)) == STEPS


def test_every_model_learns_of_the_first_micro_batch() -> None:
    """Megatron-Core's schedules call `set_is_first_microbatch` on the stage; without it Transformer Engine uses stale FP8 weights."""
    marked = []

    class Stage(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.config = name, None

        def set_is_first_microbatch(self) -> None:
            marked.append(self.name)

    StageWithFrozenModels(Stage("policy"), [Stage("reference"), Stage("proposal")]).set_is_first_microbatch()
    assert marked == ["policy", "reference", "proposal"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.proposal={kind: ema}", "kind ema takes decay and update_every; found none"),
        ("objective.proposal={kind: current, decay: 0.5}", "kind current takes no other field; found decay"),
        ("objective={name: sft, proposal: {kind: snapshot, update_every: 2}}", "proposal.kind snapshot needs iw_sft"),
        ("reference={source: cached, refresh: 3}", "refresh needs source: live"),
        ("reference={source: live, refresh: sometimes}", "refresh"),
        ("data.quality={mode: thresholds, thresholds: ['150%']}", "or a percentile from 0% to 100%; found '150%'"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, "x", override)
