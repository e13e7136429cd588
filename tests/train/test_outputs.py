"""What a run leaves: evaluation in its metrics, exports, and the checkpoints that it is configured to keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.testing import comparable_metrics
from tests.support.shared_runs import SharedRuns
from tests.support.tiny import LENGTHS

pytestmark = pytest.mark.parallel


@pytest.mark.slow
def test_evaluation_does_not_change_training(runs: SharedRuns) -> None:
    _, *lines = comparable_metrics(runs("evaluated"))
    evaluated = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]
    assert evaluated == comparable_metrics(runs("cached"))


@pytest.mark.slow
def test_unpacked_sequences_are_trained_on_and_evaluated(runs: SharedRuns) -> None:
    lines = comparable_metrics(runs("unpacked"))
    assert [line["step"] for line in lines] == list(range(2 * len(LENGTHS) // 4 + 1))
    assert [("eval/held-out/nll" in m) for m in lines] == [i % 2 == 0 for i in range(len(lines))]
    assert lines[-1]["eval/held-out/nll"] < lines[0]["eval/held-out/nll"]


def test_every_due_checkpoint_and_the_last_are_saved(runs: SharedRuns) -> None:
    kept = sorted(p.name for p in (runs("cached") / "checkpoints").iterdir())
    assert kept == ["latest", *(f"step-{step:08d}" for step in (3, 6, 9, 12, 14))]


def test_old_checkpoints_are_removed(runs: SharedRuns) -> None:
    assert len(sorted((runs("sft") / "checkpoints").glob("step-*"))) == 1, "checkpoint.keep is 1"


@pytest.mark.slow
def test_an_exported_model_gives_the_reported_evaluation_loss(runs: SharedRuns, tmp_path: Path) -> None:
    from megatron_iwsft.convert.export import export_checkpoint
    from megatron_iwsft.evaluate.score import score_corpus

    run = runs("unpacked")
    reported = comparable_metrics(run)[-1]["eval/held-out/nll"]
    score = score_corpus(export_checkpoint(run, tmp_path / "hf"), runs.directory / "corpus")
    assert score.nll == pytest.approx(reported, abs=1e-4)
    assert score.trajectories == len(LENGTHS)


@pytest.mark.slow
def test_exports_during_training_equal_exports_of_its_checkpoints(runs: SharedRuns, tmp_path: Path) -> None:
    from megatron_iwsft.convert.export import export_checkpoint

    run = runs("overlap")
    exports = run / "hf"
    assert sorted(p.name for p in exports.iterdir()) == ["step-00000007", "step-00000014"]
    offline = export_checkpoint(run, tmp_path / "hf")
    for file in offline.iterdir():
        assert (exports / "step-00000014" / file.name).read_bytes() == file.read_bytes(), file.name
    card = (offline / "README.md").read_text()
    assert Corpus.open(runs.directory / "corpus").fingerprint in card
    assert "run: `overlap`" in card


@pytest.mark.slow
def test_the_report_ranks_trajectories_by_what_the_level_makes_weights_of(runs: SharedRuns) -> None:
    from megatron_iwsft.report.run_record import read_runs
    from megatron_iwsft.report.trajectories import extreme_trajectories

    (run,) = read_runs([runs("overlap")])
    for level, of in {"sequence": lambda t: t.mean, "trajectory": lambda t: t.total}.items():
        found = extreme_trajectories(replace(run, settings=run.settings | {"objective.level": level}), 8, shown=3)
        largest, smallest = ([of(t) for t in side] for side in (found.largest, found.smallest))
        assert found.looked_at == 8 and len(largest) == len(smallest) == 3
        assert largest == sorted(largest, reverse=True) and smallest == sorted(smallest)
        assert largest[-1] >= smallest[-1]
