"""Hugging Face directories of the policy, or of its adapters, while it trains."""

from __future__ import annotations

from collections.abc import Callable

from megatron_iwsft.checkpoint.info import step_name
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.convert.export import export_running
from megatron_iwsft.errors import CheckpointError
from megatron_iwsft.hf.directory import DTYPES
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.setup import StartedRun
from megatron_iwsft.utils.text import tell


def export(
    run: StartedRun, state: TrainState, writer: CheckpointWriter, report_failure: Callable[[str], None]
) -> Callable[[StepResult], None]:
    """A collective callback that writes run.dir/hf/step-…; not on the way out of a run that was asked to stop.

    A failure is reported on every rank, and training continues.
    """
    dtype = DTYPES[run.config.export.dtype or run.config.precision.dtype]

    def write(result: StepResult) -> None:
        if result.stopping and not result.is_last:
            return
        state.gather_parameters()
        output = run.run_directory / "hf" / step_name(result.step)
        is_new = run.is_main and not output.exists()
        try:
            export_running(
                state.policy,
                run.parallel,
                output,
                writer.supporting_files(result.step),
                dtype=dtype,
                adapter=writer.adapter,
            )
        except CheckpointError as error:
            report_failure(f"the export of step {result.step} failed: {error}")
        else:
            if is_new:
                tell(f"wrote {output}")

    return write
