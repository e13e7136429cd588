"""A run that is continued with other data-parallel ranks, another global batch, or another corpus appended: said in the log, or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.testing import comparable_metrics
from megatron_iwsft.train.check import check
from megatron_iwsft.train.continuation import check_same_run, continue_data
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from tests.support import events, tiny
from tests.support.jobs import result, run_each
from tests.support.shared_runs import assert_same_checkpoints, copy_without_checkpoints_after, train_job, train_on
from tests.support.small_runs import small_run

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

STEPS = 7  # of the first run: one epoch of five steps of four sequences, and two of the next
UNPACKED = ("data.packing=none", "checkpoint.every=1", "checkpoint.keep=99")
BATCH = (*UNPACKED, "data.global_batch_size=6", "data.max_steps=null", "data.epochs=3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elsewhere")
    train_on(2, first_run(directory, "first"))
    tiny.token_corpus(directory / "second", [30] * 7, seed=4)
    continued = {
        "batch": config_of(directory, "batch", BATCH),
        "appended": config_of(directory, "appended", appended(directory)),
    }
    for settings in continued.values():
        shutil.copytree(directory / "first", settings.run.dir)
    outcomes = run_each(train_job, 2, {name: (settings,) for name, settings in continued.items()})
    for name in continued:
        result(outcomes, name)
    return directory


def first_run(directory: Path, name: str, *overrides: str) -> Config:
    return small_run(directory, name, *UNPACKED, f"data.max_steps={STEPS}", *overrides)


def config_of(directory: Path, name: str, overrides: tuple[str, ...]) -> Config:
    return small_run(directory, name, *overrides)


def appended(directory: Path, *overrides: str) -> tuple[str, ...]:
    corpora = [{"corpus": f"{directory}/corpus"}, {"corpus": f"{directory}/second/corpus", "name": "second"}]
    return (*UNPACKED, "data.corpus=null", f"data.corpora={json.dumps(corpora)}", "data.max_steps=14", *overrides)


def trained_tokens(mixture, ids: np.ndarray) -> int:
    return sum(int(mixture.mask(i)[1:].sum()) for i in ids.tolist())


def test_a_run_continues_on_another_number_of_data_parallel_ranks(directory: Path) -> None:
    copy_without_checkpoints_after(4, directory / "first", directory / "one-rank")
    train_on(1, first_run(directory, "one-rank"))
    resumed, unbroken = (comparable_metrics(directory / name) for name in ("one-rank", "first"))
    for line, expected in zip(resumed, unbroken, strict=True):
        for name in ("loss", "grad_norm", "lr", "trained_tokens"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), (line["step"], name)
    (event,) = events(directory / "one-rank", "resumed")
    assert event["text"].endswith("after step 4 with data-parallel degree 1 (was 2)")


def test_another_global_batch_goes_on_with_the_next_sequence(directory: Path) -> None:
    """Epoch 1 has 12 sequences left, epoch 2 all of 20: each is trained on once."""
    settings = first_run(directory, "x")
    mixture = open_mixture(settings)
    sampler = make_sampler(settings, mixture)
    assert len(mixture) == 20
    left = [sampler.epoch(1).packs.items[8:], sampler.epoch(2).packs.items]
    batches = [items[k : k + 6] for items in left for k in range(0, len(items), 6)]
    lines = comparable_metrics(directory / "batch")[STEPS:]
    assert [line["step"] for line in lines] == list(range(STEPS + 1, STEPS + 7))
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 2, 2]
    assert [line["sequences"] for line in lines] == [len(batch) for batch in batches] == [6, 6, 6, 6, 6, 2]
    assert [line["trained_tokens"] for line in lines] == [trained_tokens(mixture, batch) for batch in batches]
    (event,) = events(directory / "batch", "resumed")
    assert "data.global_batch_size 6 (was 4)" in event["text"]
    assert "6 sequences per step from sequence 8 of epoch 1 on" in event["text"]


def test_an_appended_corpus_joins_with_the_next_epoch(directory: Path) -> None:
    """Epoch 1 ends with step 10; the next one has 27 trajectories."""
    lines = comparable_metrics(directory / "appended")
    assert [line["step"] for line in lines if "nll/corpus second" in line and line["step"] <= 10] == []
    assert any("nll/corpus second" in line for line in lines[10:])
    settings = config_of(directory, "appended", appended(directory))
    mixture = open_mixture(settings)
    expected = make_sampler(settings, mixture).epoch(2).packs.items[:16].reshape(4, 4)
    assert [line["trained_tokens"] for line in lines[10:]] == [trained_tokens(mixture, ids) for ids in expected]
    (event,) = events(directory / "appended", "resumed")
    assert "corpus second joins with epoch 2" in event["text"]


def test_a_run_that_was_continued_elsewhere_resumes_bit_for_bit(directory: Path) -> None:
    """From the middle of an epoch with the other batch size, and from before the appended corpus joins."""
    again = {"batch": (9, BATCH), "appended": (9, appended(directory))}
    cases = {}
    for name, (step, overrides) in again.items():
        copy_without_checkpoints_after(step, directory / name, directory / f"{name}-again")
        cases[name] = (config_of(directory, f"{name}-again", overrides),)
    outcomes = run_each(train_job, 2, cases)
    for name in again:
        result(outcomes, name)
        assert comparable_metrics(directory / f"{name}-again") == comparable_metrics(directory / name)
        assert_same_checkpoints(directory / f"{name}-again", directory / name)
        assert CheckpointInfo.read(directory / f"{name}-again").host == CheckpointInfo.read(directory / name).host


REFUSED = {
    "an end before it joins": (("data.max_steps=9",), "data.corpora: second joins with epoch 2"),
    "a corpus before the others": ((), "is not the corpus that"),
    "batches set aside": (("data.global_batch_size=8",), "a rewind has set aside the batches of steps 8 to 9"),
    "another batch in steps of similar cost": (
        ("data.global_batch_size=8", "data.group_by_cost=true"),
        "data.global_batch_size is 8, but with data.group_by_cost an epoch's order depends on it: set it to 4",
    ),
    "scores that depend on all corpora": ((), "data.corpora: second was appended, but with data.quality.normalize"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_continued_is_refused_by_name(mistake: str, directory: Path) -> None:
    overrides, message = REFUSED[mistake]
    settings = config_of(directory, "first", appended(directory, *overrides))
    info = CheckpointInfo.read(directory / "first")
    if mistake == "a corpus before the others":
        turned = [entry.model_dump() for entry in reversed(settings.data.corpora)]
        settings = config_of(directory, "first", appended(directory, f"data.corpora={json.dumps(turned)}"))
    if mistake == "batches set aside":
        info = dataclasses.replace(info, host=info.host | {"divergence": {"passed_over": [3, 8, 9]}})
    if mistake == "another batch in steps of similar cost":
        info.config["data"]["group_by_cost"] = True
    run = check(settings, world_size=2)
    if (
        mistake == "scores that depend on all corpora"
    ):  # these corpora have none: as of a run that had them from the start
        info.config["data"]["quality"]["normalize"] = True
        quality = settings.data.quality.model_copy(update={"normalize": True})
        data = settings.data.model_copy(update={"quality": quality})
        run = dataclasses.replace(run, config=settings.model_copy(update={"data": data}))
    with pytest.raises(ConfigError) as error:
        check_same_run(run, info)
        continue_data(run, info)
    assert message in str(error.value)
