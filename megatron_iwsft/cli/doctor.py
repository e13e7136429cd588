"""Show what this machine has, what that enables, what to install for more, and which implementations runs use.

Lines that start with ! name something missing. With --gpu, also run short checks: a matmul in bf16 and in each FP8 recipe, each Triton
kernel, attention, a collective per process group, a training step of each backend. Exit status 1 if one fails.

With --config: does that run fit this machine? Its layout, memory per process, corpus and sidecar, disk for its checkpoints, and its time
and GPU hours: at a stated rate (--tflops, --mfu), that of an earlier run (--like), or what the run itself has attained so far.
Exit status 2 if something is missing. --gpu adds its checks.

examples:
  iwsft doctor
  iwsft doctor --gpu
  iwsft doctor --config CONFIG.yaml --like runs/earlier
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iwsft.errors import EXIT_USER_ERROR, ConfigError
from megatron_iwsft.utils.cli import positive_int
from megatron_iwsft.utils.text import LOADING, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", action="store_true", help="run short checks on the GPU, or where there is none, on the CPU"
    )
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="SECONDS", help="with --gpu: time that each check may take"
    )

    of_run = parser.add_argument_group("does a run fit this machine?")
    add = of_run.add_argument
    add("--config", metavar="CONFIG.yaml", help="config file of the run")
    add("overrides", nargs="*", metavar="section.key=value", help="set config fields; values in YAML")
    add("--gpus", type=positive_int, metavar="N", help="processes to plan for; default parallel.world_size")
    add("--model-config", metavar="FILE", help="a config.json to plan with, where the model is not on this machine")
    add("--memory", type=float, metavar="GB", help="memory per process; default: what this machine has")
    speed = of_run.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=float, metavar="X", help="model TFLOP/s that each process attains")
    speed.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="share of the GPU's bf16 peak that they attain, 0 to 1, where the peak is known",
    )
    speed.add_argument("--like", metavar="RUN_DIR", help="an earlier run that attained them: its median tflops_per_gpu")


def run(args: argparse.Namespace) -> int:
    if args.config:
        status = _fit(args)
        return (_check(args.time_limit) if args.gpu else 0) or status
    for name in ("overrides", "gpus", "model_config", "memory", "tflops", "mfu", "like"):
        if getattr(args, name):
            raise ConfigError(f"{name.replace('_', '-')}: goes with --config, which names the run.")
    return _examine(args)


def _fit(args: argparse.Namespace) -> int:
    from megatron_iwsft.config.loader import load_config

    config = load_config(args.config, args.overrides)
    world_size = args.gpus or config.parallel.world_size
    if world_size is None:
        raise ConfigError("--config needs the number of processes: --gpus N, or parallel.world_size in the config.")
    for name in ("memory", "tflops", "mfu"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ConfigError(f"--{name} must be above 0; found {getattr(args, name):g}.")
    config.layout(world_size)
    say(LOADING, error=True)

    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()

    from megatron_iwsft.distributed.context import prepare
    from megatron_iwsft.train.fit import Machine, attained_tflops, fit

    machine = Machine.here(config.run.device)  # before Megatron-Core's CPU stand-ins
    tflops = attained_tflops(Path(args.like)) if args.like else machine.tflops_at(args.mfu) if args.mfu else args.tflops
    prepare("cpu")
    found = fit(
        config, machine, world_size=world_size, memory=args.memory, tflops=tflops, model_config=args.model_config
    )
    say(str(found))
    return EXIT_USER_ERROR if found.missing else 0


def _examine(args: argparse.Namespace) -> int:
    say(LOADING, error=True)

    from megatron_iwsft.distributed.doctor import Finding, examine, paths
    from megatron_iwsft.distributed.mcore_compat import quiet_megatron

    quiet_megatron()

    def show(findings: list[Finding]) -> None:
        for finding in findings:
            line = f"{' ' if finding.ok else '!'} {finding.what:20} {finding.found:40} {finding.means}"
            say(line.rstrip())

    show(examine())
    say("\nImplementations used on this machine")
    show(paths())
    return _check(args.time_limit) if args.gpu else 0


def _check(limit_s: float) -> int:
    from megatron_iwsft.train.machine_checks import run_checks

    say("\nChecks on this machine")
    failures = []
    for outcome in run_checks(limit_s=limit_s):
        mark = "!" if outcome.status == "failed" else " "
        detail = "see below" if outcome.status == "failed" else outcome.detail
        say(f"{mark} {outcome.name:34} {outcome.status:8} {outcome.seconds:6.1f} s  {detail}")
        if outcome.status == "failed":
            failures.append(outcome)
    for outcome in failures:
        say(f"\n{outcome.name} failed:\n{outcome.detail}")
    return 1 if failures else 0
