"""Names of weights in sidecars: unchanged for Hugging Face directories, from checksums for checkpoints, whose earlier names still count."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_iwsft.checkpoint.initial_weights import InitialWeights
from megatron_iwsft.checkpoint.state import TrainState
from megatron_iwsft.checkpoint.writer import CheckpointWriter
from megatron_iwsft.config.schema import Model
from megatron_iwsft.data.manifest import MANIFEST
from megatron_iwsft.hf.architecture import Architecture
from megatron_iwsft.hf.directory import RandomInit
from megatron_iwsft.model.gpt import ModelSettings, build_model
from megatron_iwsft.model.parameters import load_weights
from megatron_iwsft.reference.sidecar import sidecar_directory
from megatron_iwsft.testing import run_distributed
from megatron_iwsft.train.check import CheckedRun
from megatron_iwsft.train.setup import reference_identities
from megatron_iwsft.utils.files import sampled_fingerprint
from tests.support import tiny

pytestmark = pytest.mark.parallel


def named(architecture: Architecture, contents: str) -> str:
    return hashlib.sha256(json.dumps([architecture.hf, contents], sort_keys=True).encode()).hexdigest()


def tensors_opened(directory: Path) -> list[str]:
    """The names of a checkpoint's tensor files that this process opens from here on."""
    opened: list[str] = []

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(str(directory)) and str(args[0]).endswith(".distcp"):
            opened.append(Path(args[0]).name)

    sys.addaudithook(note)
    return opened


def fingerprints(platform: Any, tmp: Path) -> dict[str, Any]:
    parallel = platform.parallel()
    arch = Architecture.from_hf(tiny.model_config(num_hidden_layers=1), where="test")
    chunks = build_model(arch, parallel, platform, ModelSettings())
    saved = {}
    for seed in (0, 1):
        load_weights(chunks, RandomInit(arch, seed), parallel)
        writer = CheckpointWriter(tmp / f"seed-{seed}", arch, layout=parallel.layout)
        saved[seed] = writer.save(TrainState(chunks, step=1))
    weights = {seed: InitialWeights(Model(checkpoint=str(path)), 0) for seed, path in saved.items()}
    found: dict[str, Any] = {"differ": weights[0].fingerprint != weights[1].fingerprint}
    corpus = SimpleNamespace(directory=tmp / "corpus", manifest={"template": None, "tokenizer": {"fingerprint": "t"}})
    run: Any = SimpleNamespace(
        mixture=SimpleNamespace(corpora=[corpus]),
        reference=weights[0],
        config=SimpleNamespace(precision=SimpleNamespace(described="fp32")),
    )
    run.reference_identity = partial(CheckedRun.reference_identity, run)
    run.reference_identities = partial(CheckedRun.reference_identities, run)
    opened = tensors_opened(saved[0])
    (first,) = reference_identities(run)
    found["without a sidecar"] = first.weights == weights[0].fingerprint
    found["no tensor is read for a name that no sidecar can have"] = opened == []
    if platform.rank == 0:
        earlier = type(first)(**vars(first) | {"weights": weights[0].earlier_fingerprint})
        sidecar_directory(corpus, earlier).mkdir(parents=True)
        (sidecar_directory(corpus, earlier) / MANIFEST).write_text("{}")
    found["with an earlier sidecar"] = reference_identities(run)[0].weights == weights[0].earlier_fingerprint
    if platform.rank == 0:
        sidecar_directory(corpus, first).mkdir()
    found["earlier"] = weights[0].earlier_fingerprint == named(arch, sampled_fingerprint(saved[0], "*.distcp"))
    found["with both"] = reference_identities(run)[0].weights == weights[0].fingerprint
    return found


def test_checkpoints_are_named_by_their_checksums_or_as_earlier_sidecars_do(tmp_path: Path) -> None:
    for found in run_distributed(fingerprints, 2, tmp_path):
        assert [case for case, right in found.items() if not right] == []
        assert len(found) == 6


def hf_fingerprint(platform: Any, directory: Path) -> tuple[str, str]:
    weights = InitialWeights(Model(hf=str(directory)), 0)
    return weights.fingerprint, named(weights.architecture, sampled_fingerprint(directory, "*.safetensors"))


def test_hugging_face_directories_keep_their_names(tmp_path: Path) -> None:
    from tests.convert.test_round_trip import hf_directory

    hf_directory(tmp_path / "hf")
    ((found, expected),) = run_distributed(hf_fingerprint, 1, tmp_path / "hf")
    assert found == expected
