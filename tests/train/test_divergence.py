"""Steps whose loss is not finite, and loss spikes, caused by trajectories with huge quality weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import DivergenceError
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from tests.support import events, tiny
from tests.support.shared_runs import SharedRuns, copy_without_checkpoints_after

pytestmark = pytest.mark.parallel

BAD = 17  # the trajectory with a huge score
CORPORA = {  # scores of some trajectories; 1 elsewhere
    "infinite": {BAD: 3e38},
    "all-infinite": dict.fromkeys(range(40), 3e38),
    "spiking": {BAD: 300.0},
}
SPIKE = ("run.spike={deviations: 6.0, window: 4, rewind: true, batches: 1}", "checkpoint.every=2", "checkpoint.keep=20")


def config(tmp: Path, name: str, corpus: str, *overrides: str) -> Config:
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


# run → its corpus and what distinguishes it from `config`
RUNS = {
    "skips": ("infinite", ()),
    "skips-tp2": ("infinite", ("parallel.tensor=2",)),
    "skips-plain": ("infinite", ("optimizer.distributed=false",)),
    "rewinds": ("spiking", SPIKE),
    "resumed-before": ("spiking", SPIKE),
    "resumed-after": ("spiking", SPIKE),
}
SKIPPING = ["skips", "skips-tp2", "skips-plain"]
RESUMED = ["resumed-before", "resumed-after"]


def prepare(runs: SharedRuns, name: str) -> Config:
    if name in RESUMED:
        rewinds = runs("rewinds")
        last = 2 if name == "resumed-before" else events(rewinds, "rewind")[0]["step"] + 2
        copy_without_checkpoints_after(last, rewinds, runs.directory / name)
    corpus, overrides = RUNS[name]
    return config(runs.directory, name, corpus, *overrides)


@pytest.fixture(scope="module")
def diverging_runs(tmp_path_factory: pytest.TempPathFactory) -> SharedRuns:
    directory = tmp_path_factory.mktemp("diverging")
    for name, scores in CORPORA.items():
        tiny.token_corpus(directory / name, tiny.LENGTHS, scores=[scores.get(i, 1.0) for i in range(40)])
    return SharedRuns(directory, prepare, [SKIPPING, RESUMED])


def steps_with_bad(runs: SharedRuns, run: str) -> list[int]:
    """Steps of a run whose batch has the bad trajectory, counted from 1."""
    settings = config(runs.directory, run, RUNS[run][0])
    sampler = make_sampler(settings, open_mixture(settings))
    return [
        number + 1
        for number in range(sampler.total_steps(2, None))
        if any(BAD in pack for pack in sampler.packs_at(number))
    ]


@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_is_not_finite_is_skipped_and_reported(name: str, diverging_runs: SharedRuns) -> None:
    run = diverging_runs(name)
    lines = comparable_metrics(run)
    expected = steps_with_bad(diverging_runs, name)
    assert len(expected) == 2
    assert [m["step"] for m in lines if "skipped" in m] == expected
    for step in expected:
        assert lines[step - 1]["loss"] is None or lines[step - 1]["grad_norm"] is None
        assert lines[step]["lr"] == lines[step - 1]["lr"], "a skipped step must not advance the schedule"
    assert lines[-1]["skipped_steps"] == 2
    assert all(m["loss"] is not None for m in lines if "skipped" not in m)
    reported = events(run, "skipped")
    assert [e["step"] for e in reported] == expected
    ids = Corpus.open(diverging_runs.directory / "infinite" / "corpus").meta(["id"])["id"]
    assert all(str(ids[BAD]) in e["trajectories"] for e in reported)


@pytest.mark.parametrize("name", SKIPPING[1:])
def test_runs_with_skipped_steps_agree_between_layouts(name: str, diverging_runs: SharedRuns) -> None:
    found, expected = (comparable_metrics(diverging_runs(run)) for run in (name, "skips"))
    for a, b in zip(found, expected, strict=True):
        if "skipped" not in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def divergence_error(platform, settings: Config) -> str | None:
    """The message of the DivergenceError that ends a run."""
    from megatron_iwsft.train.trainer import train

    try:
        train(settings)
    except DivergenceError as error:
        return str(error)
    return None


def test_too_many_skipped_steps_in_a_row_end_the_run(diverging_runs: SharedRuns) -> None:
    tmp = diverging_runs.directory
    settings = config(tmp, "hopeless", "all-infinite", "run.max_bad_steps=3", "checkpoint.every=1")
    message = run_distributed(divergence_error, 2, settings)[0]
    assert message is not None
    assert "3 steps in a row (run.max_bad_steps)" in message
    assert "checkpoints/step-00000002" in message, "the last good checkpoint must be named"
    assert len(comparable_metrics(tmp / "hopeless")) == 2


def test_after_a_spike_the_run_rewinds_and_passes_over_its_batch(diverging_runs: SharedRuns) -> None:
    run = diverging_runs("rewinds")
    lines = comparable_metrics(run)
    spiking = [s for s in steps_with_bad(diverging_runs, "rewinds") if s > 4]  # the window is full by then
    assert spiking
    assert [m["step"] for m in lines] == list(range(1, len(lines) + 1))
    assert [m["step"] for m in lines if m.get("skipped") == "loss spike"] == spiking
    rewind = events(run, "rewind")[0]
    assert rewind["passed_over"] == [spiking[0]]
    assert rewind["step"] < spiking[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_passes_over_the_same_batches(name: str, diverging_runs: SharedRuns) -> None:
    assert comparable_metrics(diverging_runs(name)) == comparable_metrics(diverging_runs("rewinds"))
