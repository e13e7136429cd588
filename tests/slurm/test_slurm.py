"""The batch scripts on a real two-node Slurm: each run is interrupted in some way and must end with the metrics of an unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from megatron_iwsft.data.corpus import Corpus
from megatron_iwsft.data.prepare.arithmetic import ArithmeticSettings, arithmetic_records
from megatron_iwsft.evaluate.results import results_by_step
from megatron_iwsft.testing import comparable_metrics as metrics
from tests.slurm.lab import ROOT, Lab, running_lab
from tests.support import events, tiny

pytestmark = pytest.mark.slurm

STEPS = 100
TRAIN = ROOT / "slurm" / "train.sbatch"
CHECKPOINT_EVERY = 8


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    try:
        with running_lab(tmp_path_factory.mktemp("submit dir")) as lab:
            yield lab
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)


def config_at(directory: Path, **data: object) -> Path:
    """Write the config of a run, and generate its corpus."""
    tiny.token_corpus(directory, [30 + (i * 37) % 90 for i in range(40)], scores=True)
    settings = {
        "run": {"name": "slurm", "dir": str(directory / "run"), "seed": 7, "device": "cpu", "hang_timeout_s": 120},
        "model": {"config": tiny.model_config(num_hidden_layers=2)},
        "data": {"corpus": str(directory / "corpus"), "seq_length": 128, "global_batch_size": 4, "epochs": 100}
        | {"max_steps": STEPS, "quality": {"mode": "sample"}}
        | data,
        "objective": {"name": "sft"},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 3.0e-3, "weight_decay": 0.1},
        "checkpoint": {"every": CHECKPOINT_EVERY, "keep": 3},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def train_here(config: Path, run: Path, *overrides: str) -> list[dict]:
    """The metrics of the same run with two processes, without Slurm."""
    command = [sys.executable, "-m", "megatron_iwsft.distributed.torchrun", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [*command, "megatron_iwsft", "train", "--config", str(config), f"run.dir={run}", *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(run)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return config_at(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory) -> list[dict]:
    return train_here(config, tmp_path_factory.mktemp("unbroken"))


def start(lab: Lab, config: Path, run: Path, *options: str, until: int = CHECKPOINT_EVERY + 4) -> str:
    """Submit a run on both nodes and wait until it is some steps past its first checkpoint."""
    job = lab.submit("--nodes=2", *options, TRAIN, config, f"run.dir={run}")
    lab.until(lambda: len(metrics(run)) >= until, job)
    return job


def check(lab: Lab, job: str, run: Path, unbroken: list[dict], restarts: int = 1) -> None:
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    assert int(lab.show(job)["Restarts"]) >= restarts, lab.log(job)
    assert "resuming from" in lab.log(job)
    assert f"[job {job}, restart 1]" in lab.log(job)
    assert metrics(run) == unbroken


def test_the_pipeline_with_a_stop_signal_during_training(lab: Lab, tmp_path: Path) -> None:
    records = tiny.write_jsonl(tmp_path / "rec ords.jsonl", list(arithmetic_records(200, ArithmeticSettings(), 1)))
    tokenizer = tiny.hf_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    config = config_at(tmp_path / "other", corpus=str(tmp_path / "corpus"), seq_length=512)
    options = ["--tokenizer", str(tokenizer), "--score-field", "score", "--min-score", "0.5"]
    run = tmp_path / "run"
    said = lab.call(
        ROOT / "slurm" / "pipeline.sh",
        *("--config", config, "--records", records, "--score", tmp_path / "corpus"),
        *("--nodes", "2", "--sbatch-option", "--comment=pipeline"),
        *(part for option in options for part in ("--shard-option", option)),
        *(f"run.dir={run}", "objective.name=iw_sft"),
    )
    jobs = dict(line.split(": job ") for line in said.splitlines())
    assert list(jobs) == ["shard", "reference", "train", "export", "evaluate"]
    lab.until(lambda: len(metrics(run)) >= CHECKPOINT_EVERY + 4, jobs["train"])
    lab.call("scancel", "--signal=USR1", jobs["train"])
    for job in jobs.values():
        assert lab.wait(job) == "COMPLETED", lab.log(job)
    assert "stopped after step" in lab.log(jobs["train"])
    assert "per trained token" in lab.log(jobs["evaluate"])
    assert (run / "hf" / "final" / "config.json").exists()
    check(lab, jobs["train"], run, train_here(config, tmp_path / "unbroken", "objective.name=iw_sft"))


def test_a_job_array_shards_a_corpus(lab: Lab, tmp_path: Path) -> None:
    """Three files, two tasks and a merge, submitted from another directory: the same bytes as one command writes."""
    for k in range(3):
        tiny.write_jsonl(tmp_path / f"part {k}.jsonl", list(arithmetic_records(150, ArithmeticSettings(), k)))
    options = ["--tokenizer", str(tiny.hf_tokenizer(tmp_path / "tokenizer", vocab_size=300)), "--score-field", "score"]
    inputs = [str(tmp_path / "part *.jsonl"), *options]
    script = ROOT / "slurm" / "shard_corpus.sbatch"
    array = lab.submit("--array=0-1", script, *inputs, "--output", tmp_path / "array")
    merge = lab.submit(f"--dependency=afterok:{array}", script, *inputs, "--output", tmp_path / "array")
    assert lab.wait(merge) == "COMPLETED", lab.show(merge)
    shard = [sys.executable, "-m", "megatron_iwsft", "shard", *inputs, "--output", tmp_path / "whole"]
    subprocess.run(shard, check=True, capture_output=True)
    found, expected = ((tmp_path / name / "manifest.json").read_text() for name in ("array", "whole"))
    assert found == expected  # it holds every file's hash
    assert not Corpus.open(tmp_path / "array").damage()


def test_jobs_beside_a_run_answer_for_its_steps(lab: Lab, tmp_path: Path) -> None:
    config, run = config_at(tmp_path, max_steps=4), tmp_path / "run"
    problems = tiny.write_jsonl(
        tmp_path / "sums.jsonl", [{"question": f"{a} + 7?", "answer": str(a + 7)} for a in (1, 2)]
    )
    answers = {
        "every": 2,
        "benchmarks": [str(problems)],
        "max_new_tokens": 4,
        "where": "slurm",
        "sbatch": ["--time=10"],
    }
    job = lab.submit("--nodes=2", TRAIN, config, f"evaluation.answers={json.dumps(answers)}")
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    submitted = {event["step"]: event["job"] for event in events(run, "answers submitted")}
    assert list(submitted) == [0, 2, 4], lab.log(job)
    for step, beside in submitted.items():
        assert lab.wait(beside) == "COMPLETED", (run / "logs" / f"answers-{step}-{beside}.log").read_text()
    found = results_by_step(run)
    assert list(found) == [0, 2, 4] and all(list(values) == ["eval/sums/pass@1"] for values in found.values())
    assert not list((run / "evaluation" / "models").iterdir()), "exports are removed"


def test_a_killed_rank_requeues_the_job(lab: Lab, config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    job = start(lab, config, tmp_path / "run")
    lab.rank(job, 1).kill()
    check(lab, job, tmp_path / "run", unbroken)
    assert "was ended by SIGKILL" in lab.log(job)


def test_a_preempted_job_continues(lab: Lab, config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    job = start(lab, config, tmp_path / "run")
    lab.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    check(lab, job, tmp_path / "run", unbroken)
    assert "stopped after step" in lab.log(job)


def test_names_are_never_executed_by_a_shell(lab: Lab, config: Path, tmp_path: Path) -> None:
    home = Path(tempfile.mkdtemp())  # a short path: it is part of a file name three times
    name = f"a 'quo\"ted' $(touch {home}/run1) `touch {home}/run2`; touch {home}/run3\nand a second line"
    run = tmp_path / name.replace("/", "|")
    job = lab.submit(
        *("--nodes=2", "--job-name=$(touch x)`touch y`", "--output=named-%j.log", TRAIN, config),
        *(f"run.name={json.dumps(name)}", f"run.dir={json.dumps(str(run))}", "data.max_steps=2"),
    )
    assert lab.wait(job) == "COMPLETED", lab.log(job)
    assert len(metrics(run)) == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["name"] == name
    assert [p.name for p in tmp_path.iterdir()] == [run.name]
    assert list(home.iterdir()) == []
    assert not list(lab.directory.glob("[xy]"))


@pytest.mark.long
def test_a_job_requeued_by_hand_continues(lab: Lab, config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    job = start(lab, config, tmp_path / "run")
    lab.call("scontrol", "requeue", job)
    check(lab, job, tmp_path / "run", unbroken)


@pytest.mark.long
def test_a_job_continues_after_its_node_went_down(lab: Lab, config: Path, unbroken: list[dict], tmp_path: Path) -> None:
    job = start(lab, config, tmp_path / "run")
    lab.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    lab.until(lambda: lab.state(job) == "PENDING", job)
    lab.call("scontrol", "update", "nodename=node2", "state=resume", check=False)  # it may be back already
    check(lab, job, tmp_path / "run", unbroken)


@pytest.mark.long
def test_a_job_that_reaches_its_time_limit_continues(lab: Lab, tmp_path: Path) -> None:
    config = config_at(tmp_path, max_steps=4 * STEPS, global_batch_size=16, epochs=1000)  # almost two minutes
    job = start(lab, config, tmp_path / "run", "--time=30", "--signal=B:USR1@60")
    hours, minutes, _ = (int(part) for part in lab.show(job)["RunTime"].split(":"))
    lab.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    lab.until(lambda: lab.state(job) == "PENDING", job)
    lab.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    check(lab, job, tmp_path / "run", train_here(config, tmp_path / "unbroken"))
    assert "SIGUSR1: stopping after this step" in lab.log(job)


@pytest.mark.long
def test_a_cancelled_job_stays_cancelled(lab: Lab, config: Path, tmp_path: Path) -> None:
    job = start(lab, config, tmp_path / "run")
    lab.call("scancel", job)
    assert lab.wait(job) == "CANCELLED", f"{lab.show(job)}\n{lab.log(job)}"
    assert lab.show(job)["Restarts"] == "0"
    assert "cancelled or requeued from outside" in lab.log(job)


@pytest.mark.long
def test_a_run_that_always_crashes_is_not_requeued_forever(lab: Lab, config: Path, tmp_path: Path) -> None:
    lab.env["IWSFT_MAX_CRASHES"] = "2"
    try:
        job = lab.submit(
            "--nodes=2", TRAIN, config, f"run.dir={tmp_path}/run", "checkpoint.every=0", "data.max_steps=100000"
        )
        for _ in range(2):
            lab.until(lambda: lab.state(job) == "RUNNING" and len(metrics(tmp_path / "run")) >= 2, job)
            lab.rank(job, 0).kill()
            (tmp_path / "run" / "metrics.jsonl").unlink()
    finally:
        del lab.env["IWSFT_MAX_CRASHES"]
    assert lab.wait(job) == "FAILED"
    assert "giving up" in lab.log(job)


@pytest.mark.long
def test_a_users_mistake_is_not_requeued(lab: Lab, config: Path) -> None:
    job = lab.submit("--nodes=2", TRAIN, config, "data.seq_lengthh=3")
    assert lab.wait(job) == "FAILED"
    assert lab.show(job)["Restarts"] == "0"
    assert "data.seq_lengthh is not a known key" in lab.log(job)
    assert "Traceback" not in lab.log(job)


def test_an_unfit_node_is_named(lab: Lab, config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pid = next(
        line.split()[1] for line in (lab.home / "run" / "pids").read_text().splitlines() if "keep-node2 " in line
    )
    inside = ["nsenter", "-t", pid, "-m", "--"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "run"], check=True)
    try:
        job = lab.submit("--nodes=2", TRAIN, config, f"run.dir={tmp_path}/run")
        assert lab.wait(job) == "FAILED"
    finally:
        subprocess.run([*inside, "umount", tmp_path / "run"], check=True)
    assert "unfit node node2:" in lab.log(job)
    assert "unfit node node1:" not in lab.log(job)
    assert "Submit again with --exclude" in lab.log(job)
