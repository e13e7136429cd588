"""Training on several corpora: one sidecar each, their losses in the metrics, and a killed run that continues bit for bit."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_iwsft.checkpoint.info import CheckpointInfo
from megatron_iwsft.config.loader import load_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.errors import EXIT_USER_ERROR
from megatron_iwsft.testing import comparable_metrics, run_distributed
from megatron_iwsft.train.sampling import make_sampler, open_mixture
from tests.support import tiny
from tests.support.launched_runs import LaunchedRun, write_config
from tests.support.shared_runs import train_on

pytestmark = [pytest.mark.parallel, pytest.mark.command]


def precompute(platform, settings: Config) -> list[str]:
    from megatron_iwsft.train.precompute import precompute_reference

    return precompute_reference(settings)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """iw-SFT on two corpora, one of them 2.5 times per epoch, with a held-out third and quality weights; 12 steps."""
    directory = tmp_path_factory.mktemp("mixture")
    for number, name in enumerate(("chat", "code", "held-out")):
        tiny.token_corpus(directory / name, tiny.LENGTHS[number * 10 : number * 10 + 10], seed=number, scores=True)
    corpora = [
        {"corpus": f"{directory}/chat/corpus", "name": "chat"},
        {"corpus": f"{directory}/code/corpus", "name": "code", "epochs": 2.5},
    ]
    path = write_config(
        directory,
        data={"corpus": None, "corpora": corpora, "max_steps": 12, "quality": {"mode": "weight"}},
        objective={"name": "iw_sft"},
        checkpoint={"every": 3},
        evaluation={"sets": [{"name": "held-out", "corpus": f"{directory}/held-out/corpus"}], "every": 4},
    )
    for single in ("chat", "held-out"):  # a sidecar from an earlier run, which must stay as it is
        alone = load_config(path, ["data.corpora=[]", f"data.corpus={directory}/{single}/corpus"])
        run_distributed(precompute, 2, alone)
    before = {file: file.stat().st_mtime_ns for file in (directory / "chat" / "corpus").glob("reference-*/*")}
    (directories,) = {tuple(found) for found in run_distributed(precompute, 2, load_config(path))}
    assert [Path(found).parent.parent.name for found in directories] == ["chat", "code"]
    assert before == {file: file.stat().st_mtime_ns for file in before}
    return path


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> Path:
    run = LaunchedRun(config, config.parent / "uninterrupted")
    assert run.finish() == 0, run.output
    (config.parent / "output").write_text(run.output)
    return run.directory


def test_the_loss_is_the_sum_of_the_corpora(config: Path, uninterrupted: Path) -> None:
    """And the numbers of trajectories are those of the sampler's plan."""
    settings, (at_start, *lines) = load_config(config), comparable_metrics(uninterrupted)
    mixture = open_mixture(settings)
    sampler = make_sampler(settings, mixture)
    for step, line in enumerate(lines):
        ids = np.concatenate(sampler.packs_at(step))
        trained = np.array([mixture.mask(i)[1:].sum() for i in ids.tolist()])
        of_code = ids >= mixture.starts[1]
        tokens = {"chat": trained[~of_code].sum(), "code": trained[of_code].sum()}
        assert line["sequences"] == len(ids) and line["trained_tokens"] == sum(tokens.values())
        parts = [line[f"nll/corpus {name}"] * count for name, count in tokens.items() if count]
        assert sum(parts) / sum(tokens.values()) == pytest.approx(line["nll"], rel=1e-6)
    assert all("eval/held-out/nll" in line for line in (at_start, lines[3], lines[7], lines[11]))
    output = (config.parent / "output").read_text()
    assert re.search(r"code: 2.5 passes over 10 trajectories per epoch; 71\.4% of the trajectories", output), output


def test_weights_start_at_one_with_a_sidecar_per_corpus(uninterrupted: Path) -> None:
    at_start, first = comparable_metrics(uninterrupted)[:2]
    for metrics, prefix in ((at_start, "eval/held-out/"), (first, "")):
        assert abs(metrics[f"{prefix}weight_max"] - 1) <= 1e-6 and abs(metrics[f"{prefix}weight_mean"] - 1) <= 1e-6


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = LaunchedRun(config, tmp_path / "run").wait_for_steps(5)
    for process in run.all_processes:
        process.send_signal(signal.SIGKILL)
    assert run.finish() != 0
    again = LaunchedRun(config, tmp_path / "run")
    assert again.finish() == 0, again.output
    assert "resuming from" in again.output
    assert comparable_metrics(tmp_path / "run") == comparable_metrics(uninterrupted)


def test_the_checkpoint_names_its_corpora(config: Path, uninterrupted: Path) -> None:
    fingerprints = CheckpointInfo.read(uninterrupted).corpora
    assert fingerprints == {name: Corpus.open(config.parent / name / "corpus").fingerprint for name in ("chat", "code")}


@pytest.mark.parametrize("changed", ["corpus", "epochs", "one less"])
def test_a_changed_mixture_is_refused_by_name(changed: str, config: Path, uninterrupted: Path) -> None:
    corpora = [entry.model_dump() for entry in load_config(config).data.corpora]
    if changed == "corpus":
        corpora[1]["corpus"] = f"{config.parent}/held-out/corpus"
        message = f"data.corpus {config.parent}/held-out/corpus is not the corpus that"
    elif changed == "epochs":
        corpora[1]["epochs"] = 2.0
        message = "data.corpora.1.epochs is 2.0, but"
    else:
        del corpora[0]
        message = "data.corpora is [{'corpus'"
    settings = load_config(config, [f"run.dir={uninterrupted}", f"data.corpora={json.dumps(corpora)}"])
    with pytest.raises(AssertionError, match=re.escape(message)):
        train_on(2, settings)


@pytest.mark.slow
def test_a_missing_sidecar_is_refused_by_name(config: Path, tmp_path: Path) -> None:
    corpora = [entry.model_dump() for entry in load_config(config).data.corpora]
    corpora.append({"corpus": str(tiny.token_corpus(tmp_path, [30] * 4, seed=9, scores=True).directory), "name": "new"})
    run = LaunchedRun(config, tmp_path / "run", f"data.corpora={json.dumps(corpora)}")
    assert run.finish() == EXIT_USER_ERROR
    assert f"{tmp_path}/corpus has no log-probs of this reference model" in run.output
