"""What the policy answers while it trains: pass@k and samples in the run, and the same by a job beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_iwsft.config.loader import load_config
from megatron_iwsft.config.schema import Config
from megatron_iwsft.evaluate.results import results_by_step, samples_of
from megatron_iwsft.hf.transformers_models import hugging_face_logprobs, load_in_transformers
from megatron_iwsft.testing import comparable_metrics, run_distributed
from tests.support import events, run_python, tiny
from tests.support.iw_sft_runs import LIVE, config
from tests.support.shared_runs import SharedRuns, train_job, train_on

pytestmark = pytest.mark.parallel

PROBLEMS = [{"question": f"What is {a} plus 7?", "answer": str(a + 7)} for a in range(3)]


def answering(directory: Path, name: str, *overrides: str, **answers: object) -> Config:
    """Four steps of iw-SFT that answer three problems and two prompts before the first, after the second and after the last."""
    asked = {
        "every": 2,
        "benchmarks": [f"{directory}/sums.jsonl"],
        "prompts": f"{directory}/prompts.jsonl",
        "max_new_tokens": 8,
        **answers,
    }
    steps = ("data.max_steps=4", "checkpoint.every=1", f"evaluation.answers={json.dumps(asked)}")
    return config(directory, name, LIVE, *steps, *overrides)


@pytest.fixture(scope="module")
def directory(runs: SharedRuns) -> Path:
    tiny.write_jsonl(runs.directory / "sums.jsonl", PROBLEMS)
    tiny.write_jsonl(runs.directory / "prompts.jsonl", [PROBLEMS[0], {"prompt": "Say something."}])
    return runs.directory


@pytest.fixture(scope="module")
def unbroken(directory: Path) -> Path:
    train_on(2, answering(directory, "answering"))
    train_on(2, config(directory, "silent", LIVE, "data.max_steps=4", "checkpoint.every=1"))
    return directory / "answering"


def test_results_belong_to_their_steps_and_training_is_the_same(directory: Path, unbroken: Path) -> None:
    lines = comparable_metrics(unbroken)
    assert [line["step"] for line in lines if "eval/sums/pass@1" in line] == [0, 2, 4]
    plain = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines[1:]]
    assert plain == comparable_metrics(directory / "silent")
    results = results_by_step(unbroken)
    assert results == {
        line["step"]: {"eval/sums/pass@1": line["eval/sums/pass@1"]} for line in lines if "eval/sums/pass@1" in line
    }
    assert not list((unbroken / "evaluation" / "models").iterdir()), "exports are removed"


def test_samples_have_verdicts_and_the_weights_of_training(directory: Path, unbroken: Path, tmp_path: Path) -> None:
    from megatron_iwsft.convert.export import export_checkpoint

    rows = samples_of(unbroken)
    assert [(row["step"], row["number"]) for row in rows] == [(s, n) for s in (0, 2, 4) for n in (1, 2)]
    assert [row["correct"] for row in rows[:2]][1] is None and isinstance(rows[0]["correct"], bool)
    assert all(row["weight"] == pytest.approx(1.0, abs=1e-5) for row in rows if row["step"] == 0)
    last = rows[-1]
    models = [
        load_in_transformers(export_checkpoint(source, tmp_path / source.name))
        for source in (unbroken, directory / "sft")
    ]
    tokenizer = models[0][1]
    turns = [{"role": "user", "content": last["prompt"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    out = models[0][0].generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    ids = out[0, len(prompt) :].tolist()
    assert len(ids) == last["tokens"] + (not last["cut_off"])
    q, r = (hugging_face_logprobs(model, prompt + ids)[len(prompt) - 1 :].mean() for model, _ in models)
    assert last["log_ratio"] == pytest.approx(float((q - r).detach()), rel=1e-3, abs=1e-5)
    assert last["weight"] == pytest.approx(min(16.0, float((2.0 * (q - r)).exp())), rel=1e-3)


def die_answering(platform, settings: Config) -> None:
    """End the first rank's process while it answers at step 2, after the benchmark and before the samples."""
    from megatron_iwsft.evaluate.in_run import StepAnswers

    samples = StepAnswers._samples

    def or_die(self: StepAnswers, file: Path) -> None:
        if self.step == 2:
            os._exit(9)
        samples(self, file)

    StepAnswers._samples = or_die  # type: ignore[method-assign]
    train_job(platform, settings)


@pytest.mark.slow
def test_a_run_killed_while_it_answers_resumes_bit_for_bit(directory: Path, unbroken: Path) -> None:
    settings = answering(directory, "killed-answering")
    with pytest.raises(AssertionError):
        run_distributed(die_answering, 2, settings)
    train_on(2, settings)
    run = Path(settings.run.dir)
    assert events(run, "resumed")
    assert comparable_metrics(run) == comparable_metrics(unbroken)
    assert samples_of(run) == samples_of(unbroken)
    assert results_by_step(run) == results_by_step(unbroken)


@pytest.mark.slow
@pytest.mark.command
def test_a_job_beside_the_run_gives_the_same_results(
    directory: Path, unbroken: Path, tmp_path: Path, monkeypatch
) -> None:
    """Slurm's own part is recorded: what the run submits is then started here as the batch script does. Once per step, also resumed."""
    submitted = tmp_path / "submitted"
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {submitted}\necho 17\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    settings = answering(directory, "beside", where="slurm", sbatch=["--partition=small"])
    train_on(2, settings)
    run = Path(settings.run.dir)
    jobs = [line.split() for line in submitted.read_text().splitlines()]
    assert [job[-1] for job in jobs] == ["0", "2", "4"]
    assert all("--partition=small" in job and job[-4:-1] == ["--run", str(run), "--step"] for job in jobs)
    assert jobs[0][-5].endswith("slurm/evaluate.sbatch") and results_by_step(run) == {}
    for name in ("step-00000003", "step-00000004"):
        shutil.rmtree(run / "checkpoints" / name)
    train_on(2, settings)
    assert len(submitted.read_text().splitlines()) == 3, "step 4 has the same weights again"
    assert load_config(run / "config.yaml") == settings
    done = run_python("-m", "megatron_iwsft", "evaluate", "--run", run, "--step", "2")
    assert done.returncode == 0, done.stderr
    assert results_by_step(run) == {2: results_by_step(unbroken)[2]}
    assert samples_of(run) == [row for row in samples_of(unbroken) if row["step"] == 2]
    assert not (run / "evaluation" / "models" / "step-00000002").exists()


def test_the_report_shows_results_and_samples_at_their_steps(directory: Path, unbroken: Path, tmp_path: Path) -> None:
    """Also a result that came after its step's line of metrics."""
    from megatron_iwsft.report.held_out import find_benchmarks
    from megatron_iwsft.report.page import write_report
    from megatron_iwsft.report.run_record import read_runs

    run = shutil.copytree(unbroken, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines]
    tiny.write_jsonl(run / "metrics.jsonl", kept)
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Samples while run trained" in page and "Say something." in page
    (benchmark,) = find_benchmarks(read_runs([unbroken]))
    assert sorted(model.step for model in benchmark.earlier) == [0, 2, 4]
    (record,) = read_runs([run])
    assert [step for step, _ in record.values("eval/sums/pass@1")] == [0, 2, 4]
