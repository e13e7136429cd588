"""What the policy answers while it trains: pass@k and samples, by the exported model, in this job or in one beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_iwsft
from megatron_iwsft.checkpoint.info import step_name
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.convert.export import export_running
from megatron_iwsft.distributed.agreement import on_first_rank
from megatron_iwsft.distributed.mcore_compat import random_states, set_random_states
from megatron_iwsft.errors import CheckpointError, ConfigError, UserError
from megatron_iwsft.evaluate.benchmark import read_benchmark, read_prompts
from megatron_iwsft.evaluate.in_run import StepAnswers, answered, model_directory, reference_directory
from megatron_iwsft.evaluate.results import EVALUATION
from megatron_iwsft.hf.directory import DTYPES
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.utils.files import sampled_fingerprint, write_json
from megatron_iwsft.utils.json_files import read_json

if TYPE_CHECKING:
    from megatron_iwsft.train.trainer import Trainer

_SUBMITTING_S = 60


def answers(trainer: Trainer, writer: CheckpointWriter) -> Callable[[StepResult], dict[str, Any]]:
    """A collective callback. In process it returns the metrics eval/BENCHMARK/pass@K; a job beside this one writes them later.

    A failure is reported, and training continues. Raises ConfigError or DataError here if a file cannot be read, or there is no sbatch.
    """
    run, config = trainer.run, trainer.run.config
    given, dtype = config.evaluation.answers, DTYPES[config.export.dtype or config.precision.dtype]
    on_first_rank(lambda: _check(trainer))
    reference = on_first_rank(lambda: reference_directory(config, run.run_directory))
    if given.prompts and run.objective.needs_reference and reference is None:
        trainer.events(
            "samples without weights",
            "the samples have no weights: the reference is random, refreshed, or a base under adapters, so no model directory holds it.",
        )

    def answer(result: StepResult) -> dict[str, Any]:
        model = model_directory(run.run_directory, result.step)
        try:
            trainer.state.gather_parameters()
            on_first_rank(lambda: shutil.rmtree(model, ignore_errors=True))  # of a run that was killed meanwhile
            export_running(trainer.state.policy, run.parallel, model, writer.supporting_files(result.step), dtype=dtype)
            if given.where == "slurm":
                on_first_rank(lambda: _submit(trainer, result.step))
                return {}
            step = StepAnswers(run.run_directory, result.step, model, given, run.objective, run.settings, reference)
            return on_first_rank(lambda: _in_process(step))
        except (OSError, UserError) as error:  # on all ranks
            trainer.report_failure(f"the answers of step {result.step} failed: {error}")
            return {}

    return answer


def _in_process(step: StepAnswers) -> dict[str, float]:
    """Leaves the random states of training as they were, and no model behind."""
    states = random_states()
    try:
        return step.all()
    except (OSError, UserError):
        raise
    except Exception as error:  # transformers raises whatever follows from what it reads, or from too little memory
        raise CheckpointError(
            f"transformers cannot generate from the run's model ({type(error).__name__}: {error}). "
            "Set evaluation.answers.where to slurm, or leave evaluation.answers out."
        ) from error
    finally:
        set_random_states(states)
        shutil.rmtree(step.model, ignore_errors=True)


def _check(trainer: Trainer) -> None:
    given = trainer.run.config.evaluation.answers
    for benchmark in given.benchmarks:
        read_benchmark(benchmark, limit=given.limit)
    if given.prompts:
        read_prompts(given.prompts)
    if given.where == "slurm":
        if shutil.which("sbatch") is None:
            raise ConfigError("evaluation.answers.where is slurm, but there is no sbatch here. Use in_process.")
        if not _script().is_file():
            raise ConfigError(
                f"evaluation.answers.where is slurm, but there is no {_script()}. Set IWSFT_ROOT to a checkout of this program."
            )


def _weights_in(submitted: Path) -> str | None:
    try:
        return read_json(submitted, dict[str, str], CheckpointError, advice="").get("weights")
    except (OSError, CheckpointError):
        return None


def _script() -> Path:
    root = os.environ.get("IWSFT_ROOT") or str(Path(megatron_iwsft.__file__).parents[1])
    return Path(root) / "slurm" / "evaluate.sbatch"


def _submit(trainer: Trainer, step: int) -> None:
    """Submit the job that answers for a step, and removes its model when it is done. Not again for the same weights, as after a resume."""
    run, options = trainer.run.run_directory.absolute(), trainer.run.config.evaluation.answers.sbatch
    model, submitted = model_directory(run, step), run / EVALUATION / f"job-{step_name(step)}.json"
    weights = sampled_fingerprint(model, "*.safetensors")
    if _weights_in(submitted) == weights:
        if answered(run, step, trainer.run.config.evaluation.answers):
            shutil.rmtree(model, ignore_errors=True)
        return
    log = run / "logs" / f"answers-{step}-%j.log"
    command = ["sbatch", "--parsable", f"--output={log}", *options, str(_script())]
    command += ["--run", str(run), "--step", str(step)]
    # What this job's own allocation is must not decide the other's. Where Slurm's configuration is, is the same for both.
    own = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    environment = {name: value for name, value in os.environ.items() if name not in own}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SUBMITTING_S)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"sbatch did not answer within {_SUBMITTING_S} s. Check that Slurm's controller responds (scontrol ping)."
        ) from None
    if done.returncode:
        why = done.stderr.strip().removesuffix(".") or f"status {done.returncode}"
        raise CheckpointError(
            f"sbatch failed: {why}. Correct evaluation.answers.sbatch, or set evaluation.answers.where to in_process."
        )
    job = done.stdout.strip().partition(";")[0]
    write_json(submitted, {"job": job, "weights": weights})
    trainer.events("answers submitted", f"job {job} answers for step {step}.", step=step, job=job)
