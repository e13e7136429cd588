"""The progress line and the live table; names of metrics in trackers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iwsft.config.schema import Config, Logging
from megatron_iwsft.distributed.context import Platform
from megatron_iwsft.model.flops import peak_tflops
from megatron_iwsft.train.callbacks import StepResult
from megatron_iwsft.train.callbacks import console as module
from megatron_iwsft.train.callbacks.console import Pace, console, duration, live_table
from megatron_iwsft.train.callbacks.trackers import grouped, slurm_job
from tests.support.small_runs import small_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_run(tmp_path, "run")


def result(config: Config, step: int, **more: Any) -> StepResult:
    metrics = {
        "loss": 1.5,
        "nll": 1.25,
        "grad_norm": 2.0,
        "lr": 1e-5,
        "tokens": 1000 * step,
        "step_time_s": 2.0,
        "tflops_per_gpu": 100.0 * step,
        "peak_memory_bytes": int(40e9),
    }
    return StepResult(step, 10, metrics | more, False, config)


def test_a_line_shows_means_over_the_steps_between(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as at_exit:
        show = console(
            Logging(every=2), platform=Platform(torch.device("cuda"), 0, 4), peak_tflops=1000.0, at_exit=at_exit
        )
        for step in (1, 2, 3, 4):
            show(result(config, step))
    first, second = capsys.readouterr().out.splitlines()
    assert (
        "step 2/10 | loss 1.5000" in first
        and "tokens/s/GPU 188 | TFLOP/s/GPU 150 | MFU 15.0% | memory 40.0 GB" in first
    )
    assert "tokens/s/GPU 438 | TFLOP/s/GPU 350" in second and " | left 0 s" in second


def test_skipped_and_passed_over_steps_have_a_line(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as at_exit:
        show = console(Logging(), platform=Platform(torch.device("cpu"), 0, 1), peak_tflops=None, at_exit=at_exit)
        show(StepResult(1, 10, {"loss": None, "skipped": "loss spike"}, False, config))
        show(result(config, 2, skipped="not finite", **{"eval/held out/nll": 0.5, "eval/sums/pass@1": 0.5}))
    passed_over, skipped = capsys.readouterr().out.splitlines()
    assert passed_over == "step 1/10 | passed over: loss spike"
    assert (
        "held out nll 0.5000 | sums pass@1 50.0%" in skipped
        and "skipped: not finite" in skipped
        and "MFU" not in skipped
    )


def test_the_time_left_counts_what_runs_between_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    pace = Pace()
    pace.add(result(config, 1))
    assert pace.seconds_left(result(config, 1)) is None
    pace.add(result(config, 2))
    assert pace.seconds_left(result(config, 2)) == 8 * 30.0


@pytest.mark.parametrize(("seconds", "text"), [(12, "12 s"), (185, "3:05 min"), (7620, "2:07 h"), (273600, "3 d 4 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_has_a_bar_and_every_value(config: Config) -> None:
    from rich.console import Console

    screen = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(
        live_table(result(config, 5), {"step": "5/10", "loss": "1.5", "w": "[1]", "left": "3 s", "lr": "1e-5"})
    )
    text = screen.export_text()
    assert "━━━" in text and "run" in text.splitlines()[0]
    assert all(word in text for word in ("step", "loss", "left", "5/10", "1.5", "[1]", "3 s", "1e-5"))


def test_names_cannot_control_the_terminal(config: Config) -> None:
    """Nor are they markup."""
    from rich.console import Console

    name = "[red]a[/] \x1b]0;owned\x07\x1b[2J"
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    screen = Console(record=True, width=100, force_terminal=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(live_table(result(named, 5), {f"{name} nll": "1.5", "skipped:": name}))
    text = screen.export_text(styles=True)
    assert "\x1b]" not in text and "\x07" not in text and "\x1b[2J" not in text
    assert text.count("[red]a[/] \\x1b]0;owned\\x07") == 3


def test_live_only_in_a_terminal_outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert module._is_terminal()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not module._is_terminal() and slurm_job()["job"] == "7"
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TERM", "dumb")
    assert not module._is_terminal()


def test_metrics_are_grouped_by_name() -> None:
    names = ("loss", "nll/source a", "eval_nll", "eval/held out/nll", "tokens_per_s", "data_s", "lr")
    assert [grouped(name) for name in names] == [
        "train/loss",
        "train/nll/source a",
        "eval/nll",
        "eval/held out/nll",
        "perf/tokens_per_s",
        "perf/data_s",
        "train/lr",
    ]


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA GB200", 2500.0), ("", None)]
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
