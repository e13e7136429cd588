"""Steps whose loss is not finite, and loss spikes, brought about by trajectories with absurd quality weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DivergenceError
from megatron_iwsft.testing import comparable_metrics as metrics
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.setup import make_sampler
from tests.support import tiny
from tests.support.interrupt import events

pytestmark = pytest.mark.parallel

LENGTHS = [30 + (i * 37) % 90 for i in range(40)]
BAD = 17  # the trajectory whose score is absurd
SPIKE = ("run.spike={deviations: 6.0, window: 4, rewind: true, batches: 1}", "checkpoint.every=2", "checkpoint.keep=20")


def config(tmp: Path, name: str, corpus: str, *overrides: str):
    text = f"""
run: {{name: {name}, dir: {tmp}/{name}, seed: 7}}
model: {{config: {json.dumps(tiny.model_config(num_hidden_layers=2))}}}
data: {{corpus: {tmp}/{corpus}/corpus, seq_length: 128, global_batch_size: 4, epochs: 2, quality: {{mode: weight}}}}
objective: {{name: sft}}
precision: {{dtype: fp32}}
optimizer: {{lr: 1.0e-3, warmup_fraction: 0.5}}
checkpoint: {{every: 3, keep: 9}}
"""
    return parse_config(text, list(overrides), where=name)


def all_runs(platform, tmp: Path) -> dict[str, str]:
    from megatron_iwsft.train.trainer import train

    said = {}
    train(config(tmp, "skips", "infinite"))
    train(config(tmp, "skips-tp2", "infinite", "parallel.tensor=2"))
    train(config(tmp, "skips-plain", "infinite", "optimizer.distributed=false"))
    try:
        train(config(tmp, "hopeless", "hopeless", "run.max_bad_steps=3", "checkpoint.every=1"))
    except DivergenceError as error:
        said["hopeless"] = str(error)
    train(config(tmp, "rewinds", "spiking", *SPIKE))
    for name, keep in (("resumed-before", 2), ("resumed-after", None)):
        if platform.rank == 0:
            shutil.copytree(tmp / "rewinds", tmp / name)
            back = events(tmp / "rewinds", "rewind")[0]["step"]
            for c in (tmp / name / "checkpoints").glob("step-*"):
                if int(c.name[5:]) > (keep if keep is not None else back + 2):
                    shutil.rmtree(c)
        torch.distributed.barrier()
        train(config(tmp, name, "spiking", *SPIKE))
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    tmp = tmp_path_factory.mktemp("runs")
    for name, bad in (
        ("infinite", {BAD: 3e38}),
        ("hopeless", dict.fromkeys(range(40), 3e38)),
        ("spiking", {BAD: 300.0}),
    ):
        tiny.token_corpus(tmp / name, LENGTHS, scores=[bad.get(i, 1.0) for i in range(40)])
    return tmp, run_distributed(all_runs, 2, tmp)[0]


def steps_with(run: Path, tmp: Path, corpus: str) -> list[int]:
    """Steps whose batch holds the bad trajectory, counted from 1."""
    settings = config(tmp, run.name, corpus)
    sampler = make_sampler(settings, Corpus.open(settings.data.corpus))
    return [
        number + 1
        for number in range(sampler.total_steps(2, None))
        if any(BAD in pack for pack in sampler.packs_at(number))
    ]


@pytest.mark.parametrize("name", ["skips", "skips-tp2", "skips-plain"])
def test_a_step_that_is_not_finite_is_skipped_and_told_of(runs, name: str) -> None:
    tmp, _ = runs
    lines = metrics(tmp / name)
    expected = steps_with(tmp / name, tmp, "infinite")
    assert len(expected) == 2
    assert [m["step"] for m in lines if "skipped" in m] == expected
    for step in expected:
        assert lines[step - 1]["loss"] is None or lines[step - 1]["grad_norm"] is None
        assert lines[step]["lr"] == lines[step - 1]["lr"], "the schedule stays where it was"
    assert lines[-1]["skipped_steps"] == 2
    assert all(m["loss"] is not None for m in lines if "skipped" not in m)
    told = events(tmp / name, "skipped")
    assert [e["step"] for e in told] == expected
    ids = Corpus.open(tmp / "infinite" / "corpus").meta(["id"])["id"]
    assert all(str(ids[BAD]) in e["trajectories"] for e in told)


def test_skipping_leaves_no_trace_at_any_layout(runs) -> None:
    tmp, _ = runs
    for name in ("skips-tp2", "skips-plain"):
        for a, b in zip(metrics(tmp / name), metrics(tmp / "skips"), strict=True):
            if "skipped" not in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_too_many_in_a_row_end_the_run(runs) -> None:
    tmp, said = runs
    assert "3 steps in a row (run.max_bad_steps)" in said["hopeless"]
    assert "checkpoints/step-00000002" in said["hopeless"], "the last good checkpoint is named"
    assert len(metrics(tmp / "hopeless")) == 2


def test_a_spike_is_rewound_and_its_batch_passed_over(runs) -> None:
    tmp, _ = runs
    lines = metrics(tmp / "rewinds")
    spiking = [s for s in steps_with(tmp / "rewinds", tmp, "spiking") if s > 4]  # the window is full by then
    assert spiking
    assert [m["step"] for m in lines] == list(range(1, len(lines) + 1))
    assert [m["step"] for m in lines if m.get("skipped") == "loss spike"] == spiking
    rewind = events(tmp / "rewinds", "rewind")[0]
    assert rewind["passed_over"] == [spiking[0]]
    assert rewind["step"] < spiking[0]


@pytest.mark.parametrize("name", ["resumed-before", "resumed-after"])
def test_a_resumed_run_agrees_about_what_is_passed_over(runs, name: str) -> None:
    tmp, _ = runs
    assert metrics(tmp / name) == metrics(tmp / "rewinds")
