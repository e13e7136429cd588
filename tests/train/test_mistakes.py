"""Mistakes that only show once config, corpus, model and checkpoints are seen together: each gives one error that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_iwsft.config.schema import Config
from megatron_iwsft.errors import CheckpointError, ConfigError, DataError
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.utils.files import sha256_file
from tests.support import tiny
from tests.support.iw_sft_runs import LIVE, NO_TP, SFT, config
from tests.support.shared_runs import SharedRuns, train_on

pytestmark = pytest.mark.parallel

CUSTOM = """
import torch
from megatron_iwsft.objectives.functions import Weighted


def mine(t, s):
    w = torch.sigmoid(2.0 * (t.proposal - t.reference)) * t.mask
    return Weighted(loss=-w * t.logprobs, weight=w, clipped=torch.zeros_like(w))
"""
MISTAKES = {
    "an edited custom objective": (ConfigError, "own.py:mine has changed since"),
    "no sidecar": (DataError, "has no log-probs of this reference model"),
    "a live reference of another size": (ConfigError, "needs a reference with the policy's hidden size"),
    "resume: never in a run with checkpoints": (ConfigError, "checkpoint.resume is never, but"),
    "another objective than the checkpoint's": (ConfigError, "objective.temperature is 1.0, but"),
    "another corpus than the checkpoint's": (ConfigError, "is not the corpus that"),
    "expert parallelism without experts": (ConfigError, "the qwen2 family has no experts"),
    "an evaluation corpus of another tokenizer": (DataError, "evaluation.sets: other: "),
    "an unfinished sidecar": (DataError, "are incomplete. Run `iwsft reference`"),
    "a sidecar of an older corpus": (DataError, "was computed for another version of the corpus"),
    "a truncated sidecar": (DataError, "but its index says"),
    "a sidecar with a flipped bit": (DataError, "shard-00000.bin is damaged: its checksum"),
    "a sidecar with wrong values": (
        DataError,
        "policy and reference are the same model, yet their log-probs differ by",
    ),
    "a corpus of another tokenizer": (DataError, "was made with a different tokenizer than"),
    "layers that do not divide": (ConfigError, "4 layers do not divide into 8 pipeline stages"),
    "degrees above the world size": (ConfigError, "does not divide the world size of 2 processes"),
    "no checkpoint at model.checkpoint": (CheckpointError, "holds no complete checkpoint"),
    "no corpus": (DataError, "there is no corpus at /nowhere"),
    "the id of a model": (CheckpointError, "hf download Qwen/Qwen2.5-7B --local-dir models/Qwen2.5-7B"),
    "the id of a reference": (CheckpointError, "reference.model: Qwen/Qwen2.5-7B does not exist here"),
    "positions that depend on the length": (DataError, "depend on a text's length beyond 64 tokens. Shard the records"),
}
CUSTOM_RUN = (LIVE, "data.max_steps=1")


def configs(directory: Path) -> dict[str, Config]:
    """The config of each of MISTAKES."""

    def x(*overrides: str) -> Config:
        return config(directory, "x", *overrides)

    dynamic = tiny.model_config(max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0})
    custom, another = f"objective.name={directory}/own.py:mine", f"data.corpus={directory}/another/corpus"
    damaged = {
        "an unfinished sidecar": "unfinished",
        "a sidecar of an older corpus": "stale",
        "a truncated sidecar": "truncated",
        "a sidecar with a flipped bit": "flipped",
        "a corpus of another tokenizer": "foreign/corpus",
    }
    out = {name: x(f"data.corpus={directory}/{corpus}") for name, corpus in damaged.items()}
    return out | {
        "an edited custom objective": config(directory, "own", custom, LIVE, "data.max_steps=2"),
        "no sidecar": x(f"model.checkpoint={directory}/cached"),
        "a live reference of another size": x(LIVE, f"reference.model={directory}/other"),
        "resume: never in a run with checkpoints": config(directory, "cached", "checkpoint.resume=never"),
        "another objective than the checkpoint's": config(directory, "cached", "objective.temperature=1.0"),
        "another corpus than the checkpoint's": config(directory, "sft", *SFT, "data.max_steps=4", another),
        "expert parallelism without experts": x("parallel.expert=2"),
        "an evaluation corpus of another tokenizer": x(
            f"evaluation.sets=[{{name: other, corpus: {directory}/foreign/corpus}}]"
        ),
        "a sidecar with wrong values": config(directory, "wrong", f"data.corpus={directory}/wrong"),
        "layers that do not divide": x(*NO_TP, "parallel.pipeline=2", "parallel.virtual_pipeline=4"),
        "degrees above the world size": x("parallel.tensor=4"),
        "no checkpoint at model.checkpoint": x(f"model.checkpoint={directory}/corpus"),
        "no corpus": x("data.corpus=/nowhere"),
        "the id of a model": x("model={hf: Qwen/Qwen2.5-7B}"),
        "the id of a reference": x("reference.model=Qwen/Qwen2.5-7B"),
        "positions that depend on the length": x(*SFT[:2], f"model.config={json.dumps(dynamic)}"),
    }


def make_damaged_sidecars(directory: Path) -> None:
    """Copies of the corpus and its sidecar, each damaged in one way."""
    sidecar = next((directory / "corpus").glob("reference-*")).name
    for name in ("unfinished", "stale", "truncated", "flipped", "wrong"):
        shutil.copytree(directory / "corpus", directory / name)

    (directory / "unfinished" / sidecar / "manifest.json").unlink()

    manifest = directory / "stale" / sidecar / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"corpus": "', '"corpus": "0'))

    values = directory / "truncated" / sidecar / "shard-00000.bin"
    values.write_bytes(values.read_bytes()[:-4])

    values = directory / "flipped" / sidecar / "shard-00000.bin"
    values.write_bytes(values.read_bytes()[:-1] + b"\x01")

    values, manifest = (directory / "wrong" / sidecar / name for name in ("shard-00000.bin", "manifest.json"))
    (np.fromfile(values, np.float32) * 1.1).tofile(values)
    content = json.loads(manifest.read_text())
    content["files"]["shard-00000.bin"] = sha256_file(values)
    manifest.write_text(json.dumps(content))


def errors(platform, directory: Path) -> dict[str, tuple[type, str]]:
    """(class, message) of the error that each mistake gives."""
    from megatron_iwsft.train.trainer import train

    found = {}
    for name, settings in configs(directory).items():
        try:
            train(settings)
        except Exception as error:  # the tests below want particular ones
            found[name] = (type(error), str(error))
        torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def found(runs: SharedRuns) -> dict[str, tuple[type, str]]:
    directory = runs.directory
    runs("cached")
    make_damaged_sidecars(directory)
    tiny.token_corpus(directory / "foreign", [20] * 4, vocab_size=280)
    tiny.token_corpus(directory / "another", tiny.LENGTHS, seed=1)
    small = f"model.config={json.dumps(tiny.model_config(hidden_size=32))}"
    train_on(2, config(directory, "other", *SFT[:2], small, "data.max_steps=1"))
    (directory / "own.py").write_text(CUSTOM)
    train_on(2, config(directory, "own", f"objective.name={directory}/own.py:mine", *CUSTOM_RUN))
    (directory / "own.py").write_text(CUSTOM.replace("2.0", "3.0"))
    return run_distributed(errors, 2, directory)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_error_that_names_it(mistake: str, found: dict[str, tuple[type, str]]) -> None:
    kind, message = MISTAKES[mistake]
    assert mistake in found, "no error"
    assert found[mistake][0] is kind, found[mistake]
    assert message in found[mistake][1]
