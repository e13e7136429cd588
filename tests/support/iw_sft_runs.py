"""iw-SFT runs on two processes that start from one SFT run: cached and live references, several layouts, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_iwsft.config.loader import parse_config
from megatron_iwsft.config.schema import Config
from tests.support import tiny
from tests.support.shared_runs import SharedRuns, copy_without_checkpoints_after


def config(directory: Path, name: str, *overrides: str) -> Config:
    """An iw-SFT run from the SFT run's checkpoint unless overridden; TP 2."""
    text = f"""
run: {{name: {name}, dir: {directory}/{name}, seed: 7}}
model: {{checkpoint: {directory}/sft}}
data: {{corpus: {directory}/corpus, seq_length: 128, pad_to: 1, global_batch_size: 4, epochs: 2}}
objective: {{name: iw_sft, temperature: 2.0}}
parallel: {{tensor: 2, sequence: true}}
precision: {{dtype: fp32}}
optimizer: {{lr: 3.0e-3, weight_decay: 0.1}}
checkpoint: {{every: 3, keep: 9}}
"""
    return parse_config(text, list(overrides), where=name)


SFT = (
    "objective.name=sft",
    "model.checkpoint=null",
    f"model.config={json.dumps(tiny.model_config(tie_word_embeddings=True))}",
)
FIRST_RUN = (*SFT, "data.max_steps=4", "checkpoint.keep=1")
LIVE = "reference.source=live"
NO_TP = ("parallel.tensor=1", "parallel.sequence=false")
LAYOUTS = {
    "pp2": (*NO_TP, "parallel.pipeline=2"),
    "dp2": NO_TP,
    "cp2": (*NO_TP, "parallel.context=2"),
    "plain-optimizer": ("optimizer.distributed=false",),
    "async": (*NO_TP, "checkpoint.asynchronous=true"),
    "vp2": (*NO_TP, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "overlap": (
        *NO_TP,
        "optimizer.overlap_grad_reduce=true",
        "optimizer.overlap_param_gather=true",
        "export={every: 7, at_end: true}",
    ),
}
# A run that is interrupted after step 6 (an epoch has 7) and continued → the uninterrupted run that it must repeat.
RESUMED = {
    "resumed-dp2": "dp2",  # the optimizer's states are spread over the ranks
    "resumed": "cached",
    "resumed-plain": "plain-optimizer",
    "resumed-async": "async",
    "resumed-vp2": "vp2",
}
# The same, continued at another layout: the last part of the name.
RESUMED_ELSEWHERE = {"resumed-at-pp2": "cached", "resumed-at-dp2": "cached", "resumed-dp2-at-pp2": "dp2"}


# Those of the default set first, then those that only slow tests ask for.
GROUPS = [
    ["cached", "live", "dp2"],
    ["evaluated", "unpacked"],
    ["resumed-dp2", "resumed-at-pp2"],
    [*(name for name in LAYOUTS if name != "dp2"), "live-pp2"],
    [name for name in (*RESUMED, *RESUMED_ELSEWHERE) if name not in ("resumed-dp2", "resumed-at-pp2")],
]


def overrides_of(name: str, directory: Path) -> tuple[str, ...]:
    """What distinguishes run `name` from `config`."""
    evaluation = ("evaluation.every=2", f"evaluation.sets=[{{name: held-out, corpus: {directory}/corpus}}]")
    others: dict[str, tuple[str, ...]] = {
        "sft": FIRST_RUN,
        "cached": (),
        "live": (LIVE,),
        "live-pp2": (*LAYOUTS["pp2"], LIVE),
        "evaluated": evaluation,
        "unpacked": ("data.packing=none", "data.micro_batch_size=2", LIVE, *evaluation),
    }
    return (others | LAYOUTS)[name]


def prepare(runs: SharedRuns, name: str) -> Config:
    """The config of a run; for one that resumes, its directory too. The SFT run and its sidecar must exist."""
    uninterrupted = (RESUMED | RESUMED_ELSEWHERE).get(name)
    if uninterrupted is None:
        return config(runs.directory, name, *overrides_of(name, runs.directory))
    copy_without_checkpoints_after(6, runs(uninterrupted), runs.directory / name)
    overrides = overrides_of(uninterrupted, runs.directory) + LAYOUTS.get(name.partition("-at-")[2], ())
    return config(runs.directory, name, *overrides)


def sft_and_sidecar(platform, directory: Path) -> None:
    """The start of every run: a short SFT run, and the log-probs of its policy for the whole corpus."""
    from megatron_iwsft.train.precompute import precompute_reference
    from megatron_iwsft.train.trainer import train

    train(config(directory, "sft", *FIRST_RUN))
    precompute_reference(config(directory, "cached"))
