"""Evaluation during training, the best checkpoints, and early stopping, through the real trainer on two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_iwsft.checkpoint.best import best_checkpoint
from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.cli import main as cli
from megatron_iwsft.config.schema import Config
from megatron_iwsft.convert.export import export_checkpoint
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.shard import ShardSettings, shard_corpus
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.check import check
from tests.support import events, run_python, tiny
from tests.support.iw_sft_runs import LIVE, SFT, config
from tests.support.shared_runs import SharedRuns, assert_same_checkpoints, train_job, train_on
from tests.support.small_runs import small_run

pytestmark = pytest.mark.parallel

STEPS = 8
# Upside down, so that the best one is not the last: the loss falls all the time.
BEST = "checkpoint.best={metric: eval/both/nll, mode: max, keep: 2}"


@pytest.fixture(scope="module")
def directory(runs: SharedRuns) -> Path:
    """That of the shared SFT run, with a held-out corpus of two sources."""
    sources = []
    for number, name in enumerate(("math", "code")):
        tiny.token_corpus(runs.directory / name, tiny.LENGTHS[:10], seed=number + 5)
        sources.append(shutil.copy(runs.directory / name / "records.jsonl", runs.directory / f"{name}.jsonl"))
    settings = ShardSettings(str(runs.directory / "tokenizer"))
    shard_corpus(sources, runs.directory / "both", settings, show_progress=False)
    return runs.directory


def evaluated(directory: Path, name: str, *overrides: str) -> Config:
    """iw-SFT with two evaluation sets, every third step and at both ends; it saves its best checkpoint, else only the last."""
    sets = [
        {"name": "both", "corpus": f"{directory}/both", "max_trajectories": 12},
        {"name": "trained", "corpus": f"{directory}/corpus"},
    ]
    steps = (f"data.max_steps={STEPS}", "evaluation.every=3", "checkpoint.every=0", "checkpoint.keep=1")
    return config(directory, name, f"evaluation.sets={json.dumps(sets)}", *steps, BEST, *overrides)


@pytest.fixture(scope="module")
def unbroken(directory: Path) -> Path:
    train_on(2, evaluated(directory, "unbroken", LIVE))
    return directory / "unbroken"


def test_sets_are_evaluated_before_the_first_step_every_few_and_after_the_last(unbroken: Path) -> None:
    lines = comparable_metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "eval/both/nll" in line] == [0, 3, 6, 8]
    assert "loss" not in lines[0]
    assert abs(lines[0]["eval/both/weight_max"] - 1) <= 1e-6, "the policy is the reference"
    assert lines[-1]["eval/both/weight_max"] != 1


def test_the_values_are_those_of_transformers(directory: Path, unbroken: Path, tmp_path: Path) -> None:
    """nll, weights and log-ratios of the set and of each of its sources, from exports of the last step and of the reference."""
    models = [
        load_in_transformers(export_checkpoint(source, tmp_path / source.name))[0]
        for source in (unbroken, directory / "sft")
    ]
    corpus, rows = Corpus.open(directory / "both"), []
    (held, _) = check(evaluated(directory, "unbroken", LIVE), world_size=2).held_out
    sources = corpus.meta(["source"])["source"].to_pylist()
    for i in held.plan.packs.items.tolist():
        trained = corpus.mask(i)[1:] == 1
        policy, reference = (
            hugging_face_logprobs(model, corpus.tokens(i).tolist()).detach().double().numpy()[trained]
            for model in models
        )
        log_ratio = policy - reference
        weight = float(np.clip(np.exp(2.0 * log_ratio.mean()), 0, 16))  # temperature and clip of the run
        rows.append((sources[i], -policy.sum(), log_ratio.sum(), len(policy), weight))
    assert len(rows) == 12 and len({row[0] for row in rows}) == 2

    last = comparable_metrics(unbroken)[-1]
    for source in (None, *{row[0] for row in rows}):
        own = [row for row in rows if source in (None, row[0])]
        suffix = "" if source is None else f"/source {source}"
        tokens = sum(row[3] for row in own)
        expected = {"nll": sum(row[1] for row in own) / tokens, "log_ratio": sum(row[2] for row in own) / tokens}
        expected["weight_mean"] = sum(row[4] for row in own) / len(own)
        for name, value in expected.items():
            assert last[f"eval/both/{name}{suffix}"] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, source)


def test_the_best_checkpoint_is_kept_beside_the_newest_evaluated_and_exported(
    directory: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_step = {line["step"]: line["eval/both/nll"] for line in comparable_metrics(unbroken) if "eval/both/nll" in line}
    best, second = sorted((step for step in of_step if step), key=lambda step: -of_step[step])[:2]
    assert {best, second} == {3, 6}
    names = [f"step-{step:08d}" for step in (best, second)]
    assert {p.name for p in (unbroken / "checkpoints").iterdir()} == {"best", "latest", *names, f"step-{STEPS:08d}"}
    assert (unbroken / "checkpoints" / "best").read_text().split() == names
    assert best_checkpoint(unbroken).name == names[0]
    cli.run(["evaluate", "--best", "--model", str(unbroken), "--corpus", str(directory / "corpus")])
    judged = re.search(rf"unbroken-{names[0]}: nll (\S+) per", capsys.readouterr().out)
    of_corpus = next(line["eval/trained/nll"] for line in comparable_metrics(unbroken) if line["step"] == best)
    assert judged and float(judged[1]) == pytest.approx(of_corpus, abs=1e-4)
    card = (export_checkpoint(unbroken, tmp_path / "hf", best=True) / "README.md").read_text()
    assert f"step: `{best}`" in card
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        best_checkpoint(unbroken.parent / "sft")


def train_scaled_by_steps(platform: Any, settings: Config) -> None:
    """Train as delayed scaling does on a GPU, as far as the trainer knows."""
    from megatron_iwsft.config.schema import Precision

    with mock.patch.object(Precision, "scaled_by_steps", True):
        train_job(platform, settings)


def test_scales_that_follow_the_steps_are_not_evaluated_before_the_first(tmp_path: Path) -> None:
    sets = json.dumps([{"name": "trained", "corpus": f"{tmp_path}/corpus", "max_trajectories": 4}])
    settings = small_run(tmp_path, "delayed", f"evaluation.sets={sets}", "data.max_steps=1")
    run_distributed(train_scaled_by_steps, 1, settings)
    assert [line["step"] for line in comparable_metrics(tmp_path / "delayed") if "eval/trained/nll" in line] == [1]
    (event,) = events(tmp_path / "delayed", "no evaluation")
    assert "the scales of precision.fp8 delayed are 1" in event["text"]


def die_while(platform: Any, settings: Config, moment: str) -> None:
    """Train, and end the first rank's process at `moment`, as SIGKILL would."""
    from megatron_iwsft.checkpoint.writer import CheckpointWriter
    from megatron_iwsft.train.step import TrainStep

    def then_die(function: Any, when: Any, *, before: bool) -> Any:
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            dies = calls == when and platform.rank == 0
            if dies and before:
                os._exit(9)
            out = function(*args, **kwargs)
            if dies:
                os._exit(9)
            return out

        return wrapped

    if moment == "evaluating":  # the second set, of the third evaluation
        TrainStep.evaluate = then_die(TrainStep.evaluate, 6, before=True)  # type: ignore[method-assign]
    elif moment == "saving the best":
        CheckpointWriter._publish = then_die(CheckpointWriter._publish, 2, before=True)  # type: ignore[method-assign]
    else:  # the checkpoint has its name, `best` still names the one before
        CheckpointWriter._point_at_best = then_die(CheckpointWriter._point_at_best, 2, before=True)  # type: ignore[method-assign]
    train_job(platform, settings)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluating", "saving the best", "naming the best"])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(moment: str, directory: Path, unbroken: Path) -> None:
    settings = evaluated(directory, moment.replace(" ", "-"), LIVE)
    with pytest.raises(AssertionError):
        run_distributed(die_while, 2, settings, moment)
    run = Path(settings.run.dir)
    copies = [run / "checkpoints" / name for name in ("step-00000003.mine", "best-of-all")]
    for copy in copies:  # the user's, which no retention touches
        shutil.copytree(next((run / "checkpoints").glob("step-????????")), copy)
    train_on(2, settings)
    assert events(run, "resumed")
    assert comparable_metrics(run) == comparable_metrics(unbroken)
    assert_same_checkpoints(run, unbroken)
    assert CheckpointInfo.read(run).host == CheckpointInfo.read(unbroken).host
    names = [{p.name for p in (path / "checkpoints").iterdir()} for path in (run, unbroken)]
    assert names[0] - names[1] == {copy.name for copy in copies} and not names[1] - names[0]
    assert (run / "checkpoints" / "best").read_text() == (unbroken / "checkpoints" / "best").read_text()


@pytest.mark.slow
def test_a_run_that_no_longer_improves_ends_early(directory: Path) -> None:
    """With learning rate 0. Started again it has nothing to do; with more patience it goes on."""
    stop = "run.stop_early={metric: eval/both/nll, patience: 2, min_delta: 0.001}"
    settings = (*SFT, "optimizer.lr=0", "evaluation.every=2", stop, "checkpoint.every=3", "export.at_end=true")
    for expected in (4, 4):
        train_on(2, evaluated(directory, "early", *settings))
        run = directory / "early"
        assert comparable_metrics(run)[-1]["step"] == CheckpointInfo.read(run).step == expected
        (*_, last) = events(run, "stopped early")
        assert f"after step {expected}: eval/both/nll is not better than" in last["text"]
        assert "(step 0) by more than 0.001 in 2 evaluations in a row" in last["text"]
    assert (run / "hf" / "step-00000004" / "config.json").exists(), "callbacks of the end are called"
    train_on(2, evaluated(directory, "early", *settings, "run.stop_early.patience=3"))
    assert comparable_metrics(run)[-1]["step"] == 6


@pytest.mark.slow
@pytest.mark.command
def test_an_early_stop_is_a_success_for_whoever_started_the_run(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=0", "evaluation.every=1", "run.stop_early={metric: eval/held-out/nll, patience: 2}"]
    settings = small_run(
        tmp_path, "run", *overrides, f"evaluation.sets=[{{name: held-out, corpus: {tmp_path}/corpus}}]"
    )
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    done = run_python("-m", "megatron_iwsft", "train", "--config", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert comparable_metrics(tmp_path / "run")[-1]["step"] == CheckpointInfo.read(tmp_path / "run").step == 2
    assert "after step 2: eval/held-out/nll is not better than" in done.stdout


@pytest.mark.slow
def test_a_set_without_reference_is_named_and_its_weights_cannot_decide(directory: Path) -> None:
    """With a cached reference, of which only the training corpus has log-probs."""
    train_on(2, evaluated(directory, "cached-sets", "data.max_steps=1"))
    first = comparable_metrics(directory / "cached-sets")[0]
    assert "eval/trained/weight_mean" in first
    assert "eval/both/nll" in first and "eval/both/weight_mean" not in first
    (event,) = events(directory / "cached-sets", "evaluation without reference")
    assert f"data.corpus={directory}/both" in event["text"]
    choice = "checkpoint.best={metric: eval/both/weight_ess, mode: max}"
    with pytest.raises(
        AssertionError, match=r"eval/both/weight_ess, which cannot be computed: its set has no log-probs"
    ):
        train_on(2, evaluated(directory, "no-weights", choice))
